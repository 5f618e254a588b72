# Sourced by the other scripts. Changes to the repository's folder, where relative paths then start.
# Installs the requirements file that the first argument names, unless the same content was installed
# before: into the virtual environment that is active, else into .venv, which is made if it is missing.
# PYTHON names the interpreter that makes it (default python3).

CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.."
requirements=$1
environment=${VIRTUAL_ENV:-$PWD/.venv}
if [ ! -x "$environment/bin/python" ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "error: Python 3.10 or newer is needed; name one by PYTHON=/path/to/python3" >&2
        exit 1
    }
    "${PYTHON:-python3}" -m venv "$environment" || {
        rm -f "$environment/bin/python" # half of one would pass for a whole one
        exit 1
    }
fi
installed=$environment/installed-$(cat requirements*.txt "$requirements" | cksum | tr ' ' -)
if [ ! -e "$installed" ]; then
    echo "installing $requirements into $environment (several GB, some minutes) ..."
    "$environment/bin/python" -m pip --version > /dev/null 2>&1 || # uv's environments have none
        "$environment/bin/python" -m ensurepip > /dev/null
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
    touch "$installed"
fi
export PATH="$environment/bin:$PATH"
export MPLBACKEND=agg # a notebook names its own, which this environment does not have
