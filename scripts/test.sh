#!/usr/bin/env bash
# Style and tests. DMKD_DATA names a folder with the real data for the tests that need it:
# cifar-10-batches-bin/ (or -py/) and cifake_train_fake/. Arguments are passed to pytest:
#
#     bash scripts/test.sh -m "not slow"
#
# There is one worker per core, with one thread unless OMP_NUM_THREADS says otherwise.
set -euo pipefail
source "$(dirname "$0")/environment.sh" tests/requirements.txt

ruff check .
ruff format --check .
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python -m pytest -q -n auto --dist worksteal "$@"
