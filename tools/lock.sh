#!/bin/sh
# Renew requirements.lock: the newest versions inside the ranges of pyproject.toml that agree with each other, for
# Linux, macOS and Windows and for every Python from 3.10 on. Versions that are locked already stay unless they must
# move; `make lock UPGRADE=--upgrade` moves them all.
# CUDA's own libraries are left out: torch for CUDA names them itself, torch for CPUs does not want them.
# (Triton stays: its interpreter runs our kernel's tests on a CPU, in the version that torch for CUDA names.)
set -eu
cd "$(dirname "$0")/.."
uv=$(mktemp -d)
trap 'rm -rf "$uv"' EXIT
"${PYTHON:-python3}" -m venv "$uv"
"$uv/bin/pip" install --quiet uv
cp requirements.lock "$uv/resolved" 2>/dev/null || :
"$uv/bin/uv" pip compile --quiet --universal --python-version 3.10 --all-extras --no-header --no-annotate \
    --no-emit-package setuptools ${UPGRADE:-} --output-file "$uv/resolved" pyproject.toml
{
    echo '# The exact versions that the tests ran with. Written by `make lock`; do not edit.'
    echo '# It constrains what pyproject.toml asks for:  pip install -c requirements.lock -e ".[jupyter]"'
    grep -vE "^(nvidia-|cuda-)|sys_platform == 'emscripten'" "$uv/resolved"
} > requirements.lock
echo "requirements.lock: $(grep -c == requirements.lock) pins."
