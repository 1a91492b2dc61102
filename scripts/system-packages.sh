#!/usr/bin/env bash
# System packages that some tests use. Where they cannot be installed, those tests are skipped and say why.
set -euo pipefail
need=()
command -v ip >/dev/null || [ -x /usr/sbin/ip ] || need+=(iproute2)
command -v nft >/dev/null || [ -x /usr/sbin/nft ] || need+=(nftables)
command -v node >/dev/null || need+=(nodejs)
command -v nginx >/dev/null || [ -x /usr/sbin/nginx ] || [ -n "${EDGEWARD_NGINX:-}" ] || need+=(nginx)
command -v podman >/dev/null || need+=(podman)
command -v runc >/dev/null || [ -x /usr/sbin/runc ] || need+=(runc) # crun refuses hosts with both kinds of cgroups
command -v slirp4netns >/dev/null || need+=(slirp4netns netavark)
command -v busybox >/dev/null || need+=(busybox-static)
[ ${#need[@]} -eq 0 ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  apt-get update -qq || true
  policy=/usr/sbin/policy-rc.d # nothing that is installed here is started
  if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy" && trap 'rm -f "$policy"' EXIT
  fi
  for package in "${need[@]}"; do
    DEBIAN_FRONTEND=noninteractive timeout 300 apt-get install -y -qq --no-install-recommends "$package" >/dev/null ||
      echo "$package could not be installed; the tests that use it will say so" >&2
  done
else
  echo "not installed (needs root on Debian): ${need[*]}; the tests that use them will say so" >&2
fi
