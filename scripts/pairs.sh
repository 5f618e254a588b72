#!/usr/bin/env bash
# The five pairs of networks from the tables of data-free distillation, distilled on CIFAKE.
#
#     bash scripts/pairs.sh [SEED ...]
#
# TEACHER_FLAGS and STUDENT_FLAGS are those of every teacher and of every student. Their defaults are
# for a GPU. Each teacher is trained once, with seed 0. Runs and table go to runs/pairs$TAG/. Finished
# runs are skipped, stopped ones are resumed.
set -euo pipefail
source "$(dirname "$0")/once.sh"
experiment pairs "$@"
teacher_flags=${TEACHER_FLAGS:---epochs 200 --optimizer sgd --nesterov --lr 0.1 --weight_decay 5e-4 --scheduler cosine}
# shellcheck disable=SC2206
recipe=("${both[@]}" ${STUDENT_FLAGS:---epochs 400 --scheduler cosine --augment rrc_jitter})

pair() { # pair TEACHER STUDENT
    wanted "$1_to_$2" || return 0
    # shellcheck disable=SC2086
    once "$runs/$1-0" fine_tune_teacher_cifar10.py --arch "$1" --init random \
        "${data[@]}" $teacher_flags
    student "$1_to_$2" --arch "$2" --teacher_weights "$runs/$1-0.pth"
}

for seed in ${*:-0 1 2}; do
    pair resnet34 resnet18 # published: CMI 94.84, with a teacher of 95.70
    pair vgg11_bn resnet18 # 91.13, 92.25
    pair wrn_40_2 wrn_16_1 # 90.01, 94.87
    pair wrn_40_2 wrn_40_1 # 92.78
    pair wrn_40_2 wrn_16_2 # 92.52
done
summary
