#!/bin/sh
# Makes page.tar beside this file: an image of busybox and page.html. No registry is asked and nothing is run.
set -eu
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/bin" "$work/www"
cp "$(command -v busybox)" "$work/bin/busybox"
cp page.html "$work/www/index.html"
tar -C "$work" -cf "$work.tar" bin www
trap 'rm -rf "$work" "$work.tar"' EXIT
podman import --quiet --change 'ENTRYPOINT ["/bin/busybox", "httpd", "-f", "-v", "-p", "8080", "-h", "/www"]' \
  "$work.tar" localhost/page:1
rm -f page.tar
podman save --quiet --output page.tar localhost/page:1
