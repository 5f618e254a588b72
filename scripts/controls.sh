#!/usr/bin/env bash
# Controls: what comes from the teacher, and what from the images?
#
#     bash scripts/controls.sh TEACHER [SEED ...]
#
# TEACHER is a weight file. The students are those of scripts/cpu.sh; on a GPU, use EPOCHS=50
# RECIPE="--stem cifar" for the default recipe. SETTINGS (names from below) leaves all other students
# out. DMKD_DATA is the folder of both data sets. Runs and table go to runs/controls$TAG/. Give every
# other recipe or teacher a TAG, such as _gpu. Finished runs are skipped, stopped ones are resumed.
set -euo pipefail
teacher=${1:?name the weight file of a teacher}
shift
source "$(dirname "$0")/once.sh"
experiment controls "$@"
# shellcheck disable=SC2206
recipe=(--epochs "${EPOCHS:-8}" ${RECIPE:-$fast_student})

for seed in ${*:-0 1 2}; do
    student cifake --teacher_weights "$teacher" "${both[@]}"                    # to compare with
    student hard_labels --teacher_weights "$teacher" "${both[@]}" --hard_labels # images, no teacher
    renamed=$runs/images/renamed
    if wanted renamed && [ ! -d "$renamed" ]; then
        python synthetic_data/variants.py renamed --teacher_weights "$teacher" \
            --synthetic_data_dir "$cifake" "$renamed"
    fi
    student renamed --teacher_weights "$teacher" "${data[@]}" --hard_labels \
        --synthetic_data_dir "$renamed" # the teacher's classes without the softness
    student noise --teacher_weights "$teacher" "${data[@]}" --train_on noise    # a teacher, no images
    student real --teacher_weights "$teacher" "${data[@]}" --train_on real      # the teacher's images
    student untrained_teacher --teacher_weights random "${both[@]}"             # outputs mean nothing
done
summary "$runs"/*-[0-9]*/
