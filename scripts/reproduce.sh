#!/usr/bin/env bash
# The published setting: ImageNet stem for both, T = 10, 15 + 50 epochs, three seeds.
#
#     bash scripts/reproduce.sh [START [SEED ...]]     START: imagenet, random or a weight file,
#                                                      after whose name the runs are called
#
# Needs the data (README, "Install"). Each seed has a teacher and a student. Runs and table go to
# runs/reproduction$TAG/. Finished runs are skipped, stopped ones are resumed.
set -euo pipefail
start=${1:-imagenet}
shift || true
source "$(dirname "$0")/once.sh"
[[ $start != -* ]] || usage_error "'$start' is no START"
experiment reproduction "$@"
recipe=("${both[@]}" --epochs 50 --lr 0.05 --batch_size 128 --stem imagenet)

name=$(basename "$start") && name=${name%.*}
for seed in ${*:-0 1 2}; do
    once "$runs/teacher-$name-$seed" fine_tune_teacher_cifar10.py "${data[@]}" \
        --epochs 15 --lr 0.001 --batch_size 128 --stem imagenet --init "$start" --seed "$seed"
    student "student-$name" --teacher_weights "$runs/teacher-$name-$seed.pth"
done
summary
python scripts/plot_reproduction.py "$runs"/student-*/
