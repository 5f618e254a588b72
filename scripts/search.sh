#!/usr/bin/env bash
# Which recipe for the student of scripts/cpu.sh? One change at a time, in short runs.
#
#     bash scripts/search.sh TEACHER [SEED ...]
#
# The choice is made by val_agreement: agreement with the teacher on 2,000 held-out synthetic images
# and on four shifted copies of each (brighter, less saturated, blurred, JPEG). The test accuracy is
# also in summary.csv and decides nothing. EPOCHS, IMAGES and SETTINGS (names from below) shorten it.
# DMKD_DATA is the folder of both data sets. TAG marks the folders of another search. Finished runs
# are skipped, stopped ones are resumed.
set -euo pipefail
teacher=${1:?name the weight file of a teacher}
shift
source "$(dirname "$0")/environment.sh" requirements.txt
source "$(dirname "$0")/once.sh"

runs=runs/search${TAG:-}
recipe="--data_dir ${DMKD_DATA:-data} --synthetic_data_dir ${DMKD_DATA:-synthetic_data}/cifake_train_fake
    --holdout 2000 --limit ${IMAGES:-50000} --epochs ${EPOCHS:-4} --arch airbench94 --batch_size 1000
    --optimizer muon --lr 0.24 --momentum 0.6 --weight_decay 0.005 --scheduler linear
    --augment reflect"

student() { # student NAME FLAGS...
    local name=$1
    shift
    case " ${SETTINGS:-$name} " in *" $name "*) ;; *) return 0 ;; esac
    # shellcheck disable=SC2086
    once "$runs/$name-$seed" main_train_cifar10.py \
        --teacher_weights "$teacher" --seed "$seed" $recipe "$@"
}

for seed in ${*:-0}; do
    student base
    student temperature_4 --temperature 4
    student temperature_20 --temperature 20
    student crop --augment crop
    student rrc_jitter --augment rrc_jitter
    student mixup --mixup 1
    student cutmix --cutmix 1
    student batch_500 --batch_size 500 --lr 0.17
    student batch_2000 --batch_size 2000 --lr 0.34
    student lr_012 --lr 0.12
    student lr_036 --lr 0.36
    student warmup --warmup 0.1
    student ema --ema 0.98
    student momentum_08 --momentum 0.8
    student decay_0 --weight_decay 0
done
python scripts/summarize.py "results/search${TAG:-}" "$runs"/*/
