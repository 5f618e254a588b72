#!/usr/bin/env bash
# Controls: what does a student owe to its teacher, and what to the pictures?
#
#     bash scripts/controls.sh TEACHER [SEED ...]
#
# TEACHER is a weight file. EPOCHS, of 50,000 images each, and RECIPE, the flags of every run, are
# made for a CPU; on a GPU, EPOCHS=50 RECIPE="--stem cifar". Runs go to runs/controls$TAG/ and the
# table to results/controls$TAG/: give every other recipe a TAG, such as _gpu. Finished runs are
# skipped, stopped ones are resumed.
set -euo pipefail
teacher=${1:?name the weight file of a teacher}
shift
source "$(dirname "$0")/environment.sh" requirements.txt
source "$(dirname "$0")/once.sh"
experiment controls
recipe="--epochs ${EPOCHS:-5} ${RECIPE:---stem imagenet --scheduler onecycle --nesterov}"

for seed in ${*:-0 1 2}; do
    student cifake --teacher_weights "$teacher"                          # what all are compared with
    student hard_labels --teacher_weights "$teacher" --hard_labels       # the pictures without the teacher
    student noise --teacher_weights "$teacher" --train_on noise          # the teacher without pictures
    student real --teacher_weights "$teacher" --train_on real            # the upper bound
    student untrained_teacher --teacher_weights random                   # its ten outputs mean nothing
done
summary
