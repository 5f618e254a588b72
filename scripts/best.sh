#!/usr/bin/env bash
# The long recipe: a teacher of 200 epochs, and a student of 600 with mixup and strong augmentation.
#
#     bash scripts/best.sh [SEED ...]
#
# The defaults are for a GPU. TEACHER_EPOCHS and EPOCHS shorten it. RECIPE adds flags to both, such as
# --stem imagenet. Runs and table go to runs/best$TAG/. Give every other recipe a TAG, such as _gpu.
# Finished runs are skipped, stopped ones are resumed.
set -euo pipefail
source "$(dirname "$0")/environment.sh" requirements.txt
source scripts/once.sh # environment.sh has entered the repository
experiment best
# shellcheck disable=SC2206
recipe=("${both[@]}" --epochs "${EPOCHS:-600}" --scheduler cosine --mixup 1 --augment rrc_jitter
    ${RECIPE:-})

# shellcheck disable=SC2086
for seed in ${*:-0 1 2}; do
    once "$runs/teacher-$seed" fine_tune_teacher_cifar10.py --init random --seed "$seed" \
        --epochs "${TEACHER_EPOCHS:-200}" --optimizer sgd --nesterov --lr 0.1 --weight_decay 5e-4 \
        --scheduler cosine "${data[@]}" ${RECIPE:-}
    student student --teacher_weights "$runs/teacher-$seed.pth"
done
summary
