#!/usr/bin/env bash
# Makes .venv from a lock file: with uv when it is there, else with pip. Touches nothing outside this folder.
set -euo pipefail
python=$1 uv=$2 lock=$3
if [ -z "$python" ]; then
  echo "edgeward needs Python 3.11 or newer, and found none." >&2
  echo "Type: sudo apt-get install python3 python3-venv   (macOS: brew install python)" >&2
  exit 1
fi
if [ ! -x .venv/bin/python ]; then
  if [ -n "$uv" ]; then
    "$uv" venv --quiet --python "$python" .venv
  elif ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    echo "This Python comes without the venv module. Type: sudo apt-get install python${version}-venv" >&2
    exit 1
  else
    "$python" -m venv .venv
  fi
fi
if [ -n "$uv" ]; then
  "$uv" pip install --quiet --python .venv/bin/python --require-hashes -r "$lock"
  "$uv" pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation -e .
else
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r "$lock"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
fi
echo "edgeward is installed in .venv"
