#!/usr/bin/env bash
# The wheel of an earlier state that tests/scenarios/test_upgrade.py and tests/docs run against: scripts/previous.sh COMMIT
# Renew it at each release, with the release's own commit, and raise LEVEL in src/edgeward/nodes/wire.py.
set -euo pipefail
commit=$(git rev-parse --verify "$1^{commit}")
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
git archive "$commit" | tar -x -C "$scratch"
(cd "$scratch" && PYTHONPATH= "$OLDPWD/.venv/bin/python" -m build --wheel --no-isolation --outdir "$scratch/out" .)
rm -f tests/data/previous/*.whl
cp "$scratch"/out/*.whl tests/data/previous/
echo "$commit" > tests/data/previous/COMMIT
ls -l tests/data/previous
