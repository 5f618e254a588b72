#!/usr/bin/env bash
# The paper's findings, as far as CIFAKE allows: the fidelity and the number of the images, weaker and
# larger teachers, temperature and length.
#
#     bash scripts/findings.sh TEACHER [SEED ...]
#
# TEACHER is a weight file. Every student sees EPOCHS times 50,000 views, so a small set is seen more
# often. The students are those of scripts/cpu.sh; on a GPU, use EPOCHS=50 RECIPE="--stem cifar" for
# the default recipe. WEAK lists the epochs of the weaker teachers, LARGER the networks of larger ones,
# LENGTHS the epochs of students that train longer or shorter; "" leaves them out. SETTINGS (names from
# below) leaves all other students out. ENSEMBLE lists the weight files of an ensemble. DMKD_DATA is the
# folder of both data sets. Runs, table and what measure.py says of teachers and images go to
# runs/findings$TAG/, the student to compare with goes to runs/controls$TAG/. Give every other recipe
# or teacher a TAG, such as _gpu. Finished runs are skipped, stopped ones are resumed.
set -euo pipefail
teacher=${1:?name the weight file of a teacher}
shift
source "$(dirname "$0")/once.sh"
experiment findings "$@"
epochs=${EPOCHS:-8} weak=${WEAK-1 2 4} larger=${LARGER-airbench95} lengths=${LENGTHS-4 16 32}
# shellcheck disable=SC2206
recipe=(--epochs "$epochs" "${both[@]}" ${RECIPE:-$fast_student})

on_variant() { # on_variant NAME FLAGS...: on a folder that variants.py made
    wanted "$1" || return 0
    local name=$1 folder=$runs/images/$1
    shift
    [ -d "$folder" ] || python synthetic_data/variants.py "$@" --synthetic_data_dir "$cifake" "$folder"
    measured "$runs/measures/$name" "$folder" "$teacher"
    student "$name" --teacher_weights "$teacher" --synthetic_data_dir "$folder" \
        --epochs $((epochs * 50000 / $(find "$folder" -type f | wc -l)))
}

others=
other_teacher() { # other_teacher NAME FLAGS...: and the entropy of its outputs for CIFAKE
    wanted "of_teacher_$1" || return 0
    others+=" $1"
    # shellcheck disable=SC2086
    once "$runs/teacher_$1-0" fine_tune_teacher_cifar10.py --init random "${data[@]}" $fast_teacher \
        "${@:2}"
    measured "$runs/measures/$1" "$cifake" "$runs/teacher_$1-0.pth"
}

measured "$runs/measures/teacher" "$cifake" "$teacher"
for n in $weak; do
    other_teacher "$n" --epochs "$n"
done
for arch in $larger; do
    other_teacher "$arch" --epochs 10 --arch "$arch"
done
for seed in ${*:-0 1 2}; do
    # the student to compare with: the first one of controls.sh
    runs=runs/controls${TAG:-} student cifake --teacher_weights "$teacher"
    # fidelity: images that the teacher disputes, those it does not (with the same intended classes;
    # with the same classes by the teacher), and both; degraded images
    on_variant disputed disputed --teacher_weights "$teacher"
    on_variant agreed agreed --teacher_weights "$teacher"
    on_variant matched matched --teacher_weights "$teacher"
    on_variant undivided undivided --teacher_weights "$teacher"
    on_variant blur blur --radius 1
    on_variant jpeg jpeg --quality 5
    # number
    on_variant images_5000 subset --count 5000
    on_variant images_10000 subset --count 10000
    on_variant images_25000 subset --count 25000
    # other teachers
    for name in $others; do
        student "of_teacher_$name" --teacher_weights "$runs/teacher_$name-0.pth"
    done
    # shellcheck disable=SC2086
    [ -z "${ENSEMBLE:-}" ] || student ensemble --teacher_weights $ENSEMBLE
    # temperature; T = 10 is the student of controls.sh
    for t in 1 4; do
        student "temperature_$t" --teacher_weights "$teacher" --temperature "$t"
    done
    for n in $lengths; do
        student "epochs_$n" --teacher_weights "$teacher" --epochs "$n"
    done
done
shopt -s nullglob # SETTINGS may leave all of a pattern out
summary "runs/controls${TAG:-}"/cifake-*/ "$runs"/*-[0-9]*/
