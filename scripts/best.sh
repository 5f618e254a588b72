#!/usr/bin/env bash
# The long recipe: a ResNet18 teacher of 200 epochs of SGD, and its ResNet18 student of 200 of Muon.
#
#     bash scripts/best.sh [SEED ...]
#
# The defaults are for a GPU. TEACHER_EPOCHS and EPOCHS shorten it. TEACHER names a weight file; no
# teacher is trained then. MORE adds flags to the student. Runs and table go to runs/best$TAG/. Give
# every other recipe or teacher a TAG, such as _gpu. Finished runs are skipped, stopped ones are
# resumed.
set -euo pipefail
source "$(dirname "$0")/once.sh"
experiment best "$@"
# shellcheck disable=SC2206
recipe=("${both[@]}" $muon_student --epochs "${EPOCHS:-200}" ${MORE:-})

for seed in ${*:-0 1 2}; do
    if [ -z "${TEACHER:-}" ]; then
        once "$runs/teacher-$seed" fine_tune_teacher_cifar10.py --init random --seed "$seed" \
            --epochs "${TEACHER_EPOCHS:-200}" --optimizer sgd --nesterov --lr 0.1 \
            --weight_decay 5e-4 --scheduler cosine "${data[@]}"
    fi
    student student --teacher_weights "${TEACHER:-$runs/teacher-$seed.pth}"
done
summary
