#!/usr/bin/env bash
# Which recipe for the student of scripts/cpu.sh? One change at a time to a first recipe, in short runs.
#
#     bash scripts/search.sh TEACHER [SEED ...]
#
# The choice is made by val_agreement: agreement with the teacher on 2,000 held-out synthetic images
# and on five shifted copies of each (brighter, less saturated, blurred, JPEG, sharper). The test
# accuracy is also in summary.csv and decides nothing. The last settings are for other searches:
# strong augmentation in longer runs, and optimizers for a ResNet18. EPOCHS, IMAGES (also of the test
# set, if they are fewer) and SETTINGS (names from below) shorten or lengthen the search. DMKD_DATA is
# the folder of both data sets. Runs and table go to runs/search$TAG/. Give every other teacher or
# length a TAG. Finished runs are skipped, stopped ones are resumed.
set -euo pipefail
teacher=${1:?name the weight file of a teacher}
shift
source "$(dirname "$0")/once.sh"
experiment search "$@"
# shellcheck disable=SC2206
recipe=("${both[@]}" --holdout 2000 --limit "${IMAGES:-50000}" --epochs "${EPOCHS:-4}"
    $fast --batch_size 1000 --lr 0.24 --teacher_weights "$teacher")

for seed in ${*:-0}; do
    student base
    student temperature_4 --temperature 4
    student crop --augment crop
    student rrc_jitter --augment rrc_jitter
    student batch_125 --batch_size 125 --lr 0.085
    student batch_250 --batch_size 250 --lr 0.12
    student batch_500 --batch_size 500 --lr 0.17
    student lr_012 --lr 0.12
    student lr_036 --lr 0.36
    student cosine --scheduler cosine
    # an augmentation that four epochs are too few for
    student batch_250_rrc_jitter --batch_size 250 --lr 0.12 --augment rrc_jitter
    # optimizers for a ResNet18
    student resnet18_muon --arch resnet18 --batch_size 250 --lr 0.12
    student resnet18_muon_warmup --arch resnet18 --batch_size 250 --lr 0.12 --warmup 0.1
    sgd="--arch resnet18 --optimizer sgd --momentum 0.9 --weight_decay 5e-4"
    # shellcheck disable=SC2086
    student resnet18_sgd_128 $sgd --batch_size 128 --lr 0.05
    # shellcheck disable=SC2086
    student resnet18_sgd_500 $sgd --batch_size 500 --lr 0.2 --nesterov --warmup 0.2
done
summary
