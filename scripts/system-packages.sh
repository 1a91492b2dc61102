#!/usr/bin/env bash
# System packages that some tests use. Where they cannot be installed, those tests are skipped and say why.
set -euo pipefail
need=()
command -v ip >/dev/null || [ -x /usr/sbin/ip ] || need+=(iproute2)
[ ${#need[@]} -eq 0 ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${need[@]}" >/dev/null
else
  echo "not installed (needs root on Debian): ${need[*]}; the tests that use them will say so" >&2
fi
