#!/usr/bin/env bash
# Makes .venv from a lock file: with uv when it is there (and gets through), else with pip. Touches nothing outside this
# folder.
set -euo pipefail
python=$1 uv=$2 lock=$3
if [ -z "$python" ]; then
  echo "edgeward needs Python 3.11 or newer, and found none." >&2
  echo "Type: sudo apt-get install python3 python3-venv   (macOS: brew install python)" >&2
  exit 1
fi

with_uv() {
  # the machine's own certificates, as pip's are: behind a company's proxy uv's built-in ones do not do
  export UV_NATIVE_TLS="${UV_NATIVE_TLS:-1}"
  [ -x .venv/bin/python ] || "$uv" venv --quiet --python "$python" .venv || return 1
  "$uv" pip install --quiet --python .venv/bin/python --require-hashes -r "$lock" || return 1
  "$uv" pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation -e .
}

with_pip() {
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then # none yet, or one that uv made
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
      version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
      echo "This Python comes without the venv module. Type: sudo apt-get install python${version}-venv" >&2
      exit 1
    fi
    "$python" -m venv --clear .venv
  fi
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r "$lock"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
}

if [ -z "$uv" ]; then
  with_pip
elif ! with_uv; then
  echo "uv could not install it (see above); trying pip" >&2
  with_pip
fi
echo "edgeward is installed in .venv"
