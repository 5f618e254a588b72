#!/usr/bin/env bash
# Controls: what comes from the teacher, and what from the images?
#
#     bash scripts/controls.sh TEACHER [SEED ...]
#
# TEACHER is a weight file. EPOCHS is the number of epochs of 50,000 images, and RECIPE the flags of
# every run. Their defaults are for a CPU; on a GPU, use EPOCHS=50 RECIPE="--stem cifar". Runs go to
# runs/controls$TAG/ and the table to results/controls$TAG/. Give every other recipe a TAG, such as
# _gpu. Finished runs are skipped, stopped ones are resumed.
set -euo pipefail
teacher=${1:?name the weight file of a teacher}
shift
source "$(dirname "$0")/environment.sh" requirements.txt
source "$(dirname "$0")/once.sh"
experiment controls
recipe="--epochs ${EPOCHS:-5} ${RECIPE:---stem imagenet --scheduler onecycle --nesterov}"

for seed in ${*:-0 1 2}; do
    student cifake --teacher_weights "$teacher"                          # the one to compare with
    student hard_labels --teacher_weights "$teacher" --hard_labels       # images without a teacher
    student noise --teacher_weights "$teacher" --train_on noise          # a teacher without images
    student real --teacher_weights "$teacher" --train_on real            # the upper bound
    student untrained_teacher --teacher_weights random                   # its ten outputs mean nothing
done
summary
