#!/usr/bin/env bash
# Renews the lock files (needs uv). They hold names, versions and hashes; where packages come from is the machine's matter.
set -euo pipefail
cd "$(dirname "$0")/.."
options=(--quiet --no-emit-project --no-header --no-annotate --format requirements-txt)
uv lock --quiet "$@"
uv export "${options[@]}" --no-default-groups --group setup -o requirements.lock >/dev/null
uv export "${options[@]}" --all-groups -o requirements-dev.lock >/dev/null
