#!/bin/sh
# Create .venv and install the pinned set:  tools/setup.sh [EXTRA]
# EXTRA is jupyter (the default: notebooks and explorers) or dev (tests as well).
# Needs Python 3.10 or newer with venv; PYTHON=… chooses one. TORCH_INDEX=… chooses where torch comes from.
set -eu
cd "$(dirname "$0")/.."
venv=.venv
extra=${1:-jupyter}
started=$(date +%s)

fail() {
    printf '\n%s\n' "$@" >&2
    exit 1
}

usable='import sys; assert sys.version_info >= (3, 10); import ensurepip, venv'

find_python() { # the first interpreter that is new enough and can make virtual environments
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python}; do
        if "$candidate" -c "$usable" 2> /dev/null; then
            command -v "$candidate"
            return
        fi
    done
}

explain_missing_python() {
    found=${PYTHON:-python3}
    version=$("$found" -c 'import platform; print(platform.python_version())' 2> /dev/null || :)
    [ -n "$version" ] || fail "No Python was found as '$found'. Install Python 3.10 or newer, or say where it is:" \
        "    make quickstart PYTHON=/path/to/python3"
    "$found" -c 'import sys; assert sys.version_info >= (3, 10)' 2> /dev/null ||
        fail "'$found' is Python $version, but m2f_lab needs 3.10 or newer. Install one, or say where it is:" \
            "    make quickstart PYTHON=/path/to/python3"
    fail "Python $version ('$found') cannot create virtual environments: its venv or ensurepip module is missing." \
        "On Debian and Ubuntu:  apt-get install python3-venv"
}

if ! "$venv/bin/python" -c "$usable" 2> /dev/null || ! "$venv/bin/python" -m pip --version > /dev/null 2>&1; then
    python=$(find_python)
    [ -n "$python" ] || explain_missing_python
    echo "Creating $venv with $("$python" --version) ($python)"
    rm -rf "$venv"
    "$python" -m venv "$venv" || fail "$python could not create $venv; the lines above say why."
fi

pip() { # quiet, but an error is shown with the way out
    "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@" 2> "$venv/pip.log" || {
        grep -v '^WARNING: Location' "$venv/pip.log" >&2 || :
        fail "Installing failed; the lines above say why. Is there a network, and is the disk full (2 GB are needed, 8 GB with CUDA)?" \
            "Then run the same command again: what was installed stays."
    }
}

# PyPI's torch for Linux carries 3 GB of CUDA libraries. Without an NVIDIA driver, take PyTorch's build for CPUs.
cpu_index=https://download.pytorch.org/whl/cpu
if [ -z "${TORCH_INDEX+set}" ] && [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi > /dev/null 2>&1; then
    TORCH_INDEX=$cpu_index
fi

echo "Installing the versions of requirements.lock into $venv"
pip install 'pip>=24'
echo "  torch (200 MB for CPUs, 3 GB for CUDA)"
if [ -n "${TORCH_INDEX:-}" ]; then # an index that cannot be reached is passed over
    pip install --retries 0 --timeout 15 --no-compile --extra-index-url "$TORCH_INDEX" -c requirements.lock torch torchvision
else
    pip install --no-compile -c requirements.lock torch
fi
echo "  everything else (150 MB)"
pip install --no-compile -c requirements.lock -e ".[$extra]"
echo "Installed in $(($(date +%s) - started)) s."
