#!/usr/bin/env bash
# The published setting: ImageNet stem for both, T = 10, 15 + 50 epochs, three seeds.
#
#     bash scripts/reproduce.sh [START [SEED ...]]     START: imagenet, random or a weight file
#
# Needs the data (README, "The real experiment"). Each seed has a teacher and a student, in
# runs/reproduce/. What is finished is skipped, what was stopped goes on.
set -euo pipefail
start=${1:-imagenet}
shift || true
source "$(dirname "$0")/environment.sh" requirements.txt
source "$(dirname "$0")/once.sh"

name=$(basename "${start%.*}")
for seed in ${*:-0 1 2}; do
    once "runs/reproduce/teacher-$name-$seed" fine_tune_teacher_cifar10.py \
        --epochs 15 --lr 0.001 --batch_size 128 --stem imagenet --init "$start" --seed "$seed"
    once "runs/reproduce/student-$name-$seed" main_train_cifar10.py \
        --epochs 50 --lr 0.05 --batch_size 128 --stem imagenet --seed "$seed" \
        --teacher_weights "runs/reproduce/teacher-$name-$seed.pth"
done
python scripts/summarize.py results/reproduction runs/reproduce/*/
python scripts/plot_reproduction.py results/reproduction/student-*
