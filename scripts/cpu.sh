#!/usr/bin/env bash
# The real experiment without a GPU: a teacher, its student and their plots, with small networks.
#
#     bash scripts/cpu.sh [SEED ...]
#
# Needs CIFAR-10 and CIFAKE (README, "The experiment"), 2 GB of memory, and about an hour. Each run
# prints a forecast of its time after the first steps. DMKD_DATA=FOLDER names a folder with both data
# sets; the default is where the scripts expect them. TAG=_off RECIPE="--amp off" makes another
# table, in results/cpu_off. Finished runs are skipped, stopped ones are resumed.
set -euo pipefail
source "$(dirname "$0")/environment.sh" requirements.txt
source "$(dirname "$0")/once.sh"

runs=runs/cpu${TAG:-}
real=${DMKD_DATA:-data}
synthetic=${DMKD_DATA:-synthetic_data}/cifake_train_fake

if ! ls -d "$real"/cifar-10-batches-{bin,py} > /dev/null 2>&1; then
    echo "note: CIFAR-10 is not in $real, it will be downloaded there (170 MB)"
fi
if [ ! -d "$synthetic" ]; then
    echo "error: CIFAKE is not in $synthetic: put the images of its train/FAKE there (see synthetic_data/README.md)" >&2
    exit 1
fi
free=$(awk '/MemAvailable/ {print int($2 / 2^20)}' /proc/meminfo 2> /dev/null || echo 99)
[ "$free" -ge 2 ] || echo "note: only $free GB of memory are free; 2 GB are needed"
cores=$(getconf _NPROCESSORS_ONLN)
[ "$cores" -ge 2 ] || echo "note: there is one core; two halve the time"

airbench="--arch airbench94 --batch_size 1000 --optimizer muon --lr 0.24 --momentum 0.6
    --weight_decay 0.005 --scheduler linear --augment reflect --data_dir $real ${RECIPE:-}"

# shellcheck disable=SC2086
for seed in ${*:-0}; do
    once "$runs/teacher-$seed" fine_tune_teacher_cifar10.py --init random --epochs 10 \
        --seed "$seed" $airbench
    once "$runs/student-$seed" main_train_cifar10.py --teacher_weights "$runs/teacher-$seed.pth" \
        --synthetic_data_dir "$synthetic" --epochs 12 --seed "$seed" $airbench
done
python scripts/summarize.py "results/cpu${TAG:-}" "$runs"/*/
