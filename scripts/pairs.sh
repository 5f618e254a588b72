#!/usr/bin/env bash
# The five pairs of networks that the tables of data-free distillation have, distilled on CIFAKE.
#
#     bash scripts/pairs.sh [SEED ...]
#
# TEACHER and STUDENT are the flags of every teacher and of every student; as they are, they are made
# for a GPU. Each teacher is trained once, with seed 0. Runs go to runs/pairs/. What is finished is
# skipped, what was stopped goes on.
set -euo pipefail
source "$(dirname "$0")/environment.sh" requirements.txt
source "$(dirname "$0")/once.sh"
teacher=${TEACHER:---epochs 200 --optimizer sgd --nesterov --lr 0.1 --weight_decay 5e-4 --scheduler cosine}
student=${STUDENT:---epochs 400 --scheduler cosine --mix cutmix --augment strong}

# shellcheck disable=SC2086
pair() { # pair TEACHER STUDENT
    once "runs/pairs/$1-0" fine_tune_teacher_cifar10.py --arch "$1" --init random $teacher
    once "runs/pairs/$1_to_$2-$seed" main_train_cifar10.py --arch "$1" --student_arch "$2" \
        --teacher_weights "runs/pairs/$1-0.pth" --seed "$seed" $student
}

for seed in ${*:-0 1 2}; do
    pair resnet34 resnet18 # published: CMI 94.84, with a teacher of 95.70
    pair vgg11_bn resnet18 # 91.13, 92.25
    pair wrn_40_2 wrn_16_1 # 90.01, 94.87
    pair wrn_40_2 wrn_40_1 # 92.78
    pair wrn_40_2 wrn_16_2 # 92.52
done
python scripts/summarize.py results/pairs runs/pairs/*/
