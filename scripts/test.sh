#!/usr/bin/env bash
# Style and tests. DMKD_DATA names a folder with the real data for the tests that want it: it holds
# cifar-10-batches-bin/ (or -py/) and cifake_train_fake/. Arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/environment.sh" tests/requirements.txt

ruff check .
ruff format --check .
python -m pytest -q "$@"
