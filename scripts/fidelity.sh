#!/usr/bin/env bash
# How faithful should synthetic images be? The same student on sets of different guidance and steps.
#
#     bash scripts/fidelity.sh          the study; needs CIFAR-10, and CIFAKE for one more point
#     bash scripts/fidelity.sh toy      the same commands at toy sizes, on a CPU, to check them
#
# DMKD_DATA is the folder of both data sets. GUIDANCE, STEPS, SEEDS and COUNTS, lists in quotes, choose
# other points. The table has the FID if torch-fidelity is installed. Everything goes to runs/fidelity/.
# Finished runs are skipped, stopped ones are resumed.
set -euo pipefail
if [ "$*" != "" ] && [ "$*" != toy ]; then
    echo "error: the one argument is toy; the first lines of $0 say how to use it" >&2
    exit 2
fi
source "$(dirname "$0")/once.sh"

if [ "$*" = toy ]; then
    top=runs/fidelity-toy
    guidance=${GUIDANCE:-1 2} steps=${STEPS:-2} seeds=${SEEDS:-0} counts=${COUNTS:-20 40}
    per_class=4 larger=8 larger_steps=2 fewest=20
    generator="--epochs 1 --channels 8 --layers 1 --batch_size 50 --limit 100 --device cpu"
    sampler="--device cpu"
    expert="--epochs 1 --limit 100 --batch_size 50 --init random --stem imagenet --device cpu"
    beginner=$expert
    pupil="--epochs 2 --limit 100 --batch_size 20 --stem imagenet --device cpu"
    updates=4 batch=20
    measure="--limit 100 --neighbours 24 --device cpu"
else
    top=runs/fidelity
    guidance=${GUIDANCE:-1 1.5 2 3 4 6} steps=${STEPS:-10 50 100} seeds=${SEEDS:-0 1 2}
    counts=${COUNTS:-10000 50000 200000 500000}
    per_class=5000 larger=50000 larger_steps=50 fewest=10000
    generator="--epochs 100"
    sampler="--batch_size 1000"
    sgd="--optimizer sgd --nesterov --lr 0.1 --weight_decay 5e-4 --scheduler onecycle"
    expert="--init random $sgd --epochs 50"
    beginner="--init random $sgd --epochs 2"
    pupil="--epochs 50"
    updates=19500 batch=128
    measure=""
fi
listed() { # listed NAME PATTERN VALUE...: whether all values look like it, before hours are spent
    local value
    for value in "${@:3}"; do
        [[ $value =~ ^($2)$ ]] || usage_error "$1: '$value' does not fit"
    done
}
listed GUIDANCE '[1-9][0-9]?(\.[0-9]+)?|100' $guidance
listed STEPS '[1-9][0-9]{0,2}|1000' $steps
listed SEEDS '[0-9]+' $seeds
listed COUNTS '[1-9][0-9]*' $counts
for count in $counts; do
    [ "$count" -ge $fewest ] && [ "$count" -le $((10 * larger)) ] || # --limit cuts the test set, too
        usage_error "COUNTS: $count is not from $fewest to $((10 * larger))"
done
source "$(dirname "$0")/environment.sh" requirements-generate.txt

images() { # images NAME FLAGS...: a set of the generator, and its measures
    python synthetic_data/generate.py --pipeline local --model $top/generator.pth $sampler \
        --output "$top/images/$1" "${@:2}"
    measured "$top/measures/$1" "$top/images/$1/images" "$top/expert.pth" $measure
}
students() { # students NAME FOLDER TEACHER: one per seed
    for seed in $seeds; do
        once "$top/students/$1/$3-$seed" main_train_cifar10.py --synthetic_data_dir "$2" "${data[@]}" \
            --teacher_weights $top/$3.pth --seed "$seed" $pupil
    done
}

echo "== a generator, and two teachers: an expert and a beginner"
once $top/generator synthetic_data/train_diffusion.py "${data[@]}" $generator
once $top/expert fine_tune_teacher_cifar10.py "${data[@]}" $expert
once $top/beginner fine_tune_teacher_cifar10.py "${data[@]}" $beginner

echo "== students of the expert, by guidance and steps; CIFAKE is one more point"
for g in $guidance; do
    for s in $steps; do
        images "g$g-s$s" --guidance_scale "$g" --steps "$s" --per_class $per_class
        students "g$g-s$s" "$top/images/g$g-s$s/images" expert
    done
done
if [ -d "$cifake" ]; then
    measured "$top/measures/cifake" "$cifake" "$top/expert.pth" $measure
    students cifake "$cifake" expert
fi

echo "== students of the beginner, by guidance: does the best fidelity depend on the teacher?"
for g in $guidance; do
    s=${steps##* } # the last
    students "g$g-s$s" "$top/images/g$g-s$s/images" beginner
done

echo "== students of the expert, by the number of images, with the same number of updates"
images more --guidance_scale 2 --steps $larger_steps --per_class $larger
for count in $counts; do
    epochs=$(((updates + count / batch - 1) / (count / batch)))
    for seed in $seeds; do
        once "$top/counts/$count-$seed" main_train_cifar10.py "${data[@]}" \
            --synthetic_data_dir $top/images/more/images --teacher_weights $top/expert.pth \
            --seed "$seed" $pupil --epochs $epochs --limit "$count"
    done
done

python scripts/plot_fidelity.py $top $top
