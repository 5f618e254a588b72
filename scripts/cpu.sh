#!/usr/bin/env bash
# The real experiment without a GPU: a teacher, its student and their plots, with small networks.
#
#     bash scripts/cpu.sh [SEED ...]
#
# Needs CIFAR-10 and CIFAKE (README, "Install"), 2 GB of memory, and one to two hours. Each run
# prints a forecast of its time after the first steps. DMKD_DATA=FOLDER names a folder with both data
# sets; the default is where the scripts expect them. Runs, plots, networks and table go to
# runs/cpu$TAG/: TAG=_off MORE="--amp off" adds this flag to both, in runs/cpu_off/. Finished runs are
# skipped, stopped ones are resumed.
set -euo pipefail
source "$(dirname "$0")/once.sh"
experiment cpu "$@"

if [ ! -d "$real/cifar-10-batches-bin" ] && [ ! -d "$real/cifar-10-batches-py" ]; then
    echo "note: CIFAR-10 is not in $real, it will be downloaded there (170 MB)"
fi
if [ -z "$(ls "$cifake" 2> /dev/null)" ]; then # no folder, or an empty one
    echo "error: CIFAKE is not in $cifake: put the images of its train/FAKE there (see synthetic_data/README.md)" >&2
    exit 1
fi
free=$(awk '/MemAvailable/ {print int($2 / 2^20)}' /proc/meminfo 2> /dev/null || echo 99)
[ "${free:-99}" -ge 2 ] || echo "note: only $free GB of memory are free; 2 GB are needed"
cores=$(getconf _NPROCESSORS_ONLN)
[ "$cores" -ge 2 ] || echo "note: there is one core; two halve the time"

# shellcheck disable=SC2086,SC2206
recipe=($fast_student --epochs 24 "${both[@]}" ${MORE:-})
# shellcheck disable=SC2086
for seed in ${*:-0}; do
    once "$runs/teacher-$seed" fine_tune_teacher_cifar10.py --init random --seed "$seed" \
        $fast_teacher --epochs 10 "${data[@]}" ${MORE:-}
    student student --teacher_weights "$runs/teacher-$seed.pth"
done
summary
