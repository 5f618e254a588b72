# Sourced by the other scripts. Enters the repository, makes .venv there and installs the requirements
# file that the first argument names, unless the same content was installed before. PYTHON names the
# interpreter that makes .venv (default python3).

cd "$(dirname "${BASH_SOURCE[0]}")/.."
requirements=$1
if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "error: Python 3.10 or newer is needed; name one by PYTHON=/path/to/python3" >&2
        exit 1
    }
    "${PYTHON:-python3}" -m venv .venv
fi
installed=.venv/installed-$(cat requirements.txt "$requirements" | cksum | tr ' ' -)
if [ ! -e "$installed" ]; then
    echo "installing $requirements into .venv (several GB, some minutes) ..."
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
    touch "$installed"
fi
export PATH="$PWD/.venv/bin:$PATH"
