#!/usr/bin/env bash
# Which recipe for the student? Each lever by itself, and the likely ones together, for a short run.
#
#     bash scripts/search.sh TEACHER [SEED ...]
#
# To be chosen by val_agreement, or by val_kd_loss at the same temperature, on 2,000 synthetic images
# that no student trains on: summary.csv has them beside the test accuracy, which must not decide.
# EPOCHS and RECIPE, the flags of every run, are made for a GPU. Runs go to runs/search$TAG/ and the
# table to results/search$TAG/: give every other recipe a TAG, such as _short. What is finished is
# skipped, what was stopped goes on.
set -euo pipefail
teacher=${1:?name the weight file of a teacher}
shift
source "$(dirname "$0")/environment.sh" requirements.txt
source "$(dirname "$0")/once.sh"
tag=${TAG:-}
recipe="--epochs ${EPOCHS:-100} --holdout 2000 ${RECIPE:---scheduler cosine}"

student() { # student NAME FLAGS...
    local name=$1
    shift
    # shellcheck disable=SC2086
    once "runs/search$tag/$name-$seed" main_train_cifar10.py \
        --teacher_weights "$teacher" --seed "$seed" $recipe "$@"
}

for seed in ${*:-0}; do
    student base
    student cutmix --mix cutmix
    student mixup --mix mixup
    student strong --augment strong
    student strong_cutmix --augment strong --mix cutmix
    student strong_mixup --augment strong --mix mixup
    student nesterov_ema --nesterov --ema 0.999
    student standardize --standardize_logits --temperature 2
    student batch_512 --batch_size 512 --lr 0.2
    for t in 1 4 20; do
        student "temperature_$t" --temperature "$t"
    done
done
python scripts/summarize.py "results/search$tag" "runs/search$tag"/*/
