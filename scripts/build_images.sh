#!/usr/bin/env bash
# scripts/build_images.sh [TARGET...]: executes the Dockerfile (gateway by default) where no container engine runs, with
# buildah in a chroot. The base image is bootstrapped from Debian's packages, with what the official slim image leaves
# out removed, since no registry is asked. As root, on Debian, with buildah and debootstrap:
#
#   apt-get install --no-install-recommends buildah debootstrap
#
# TRAINER=train in the environment leaves CUDA out of the trainer.
# pip inside of the build is set up as it is outside: certificates, indexes, folders of wheels.
set -euo pipefail
cd "$(dirname "$0")/.."
for tool in buildah debootstrap; do
  command -v $tool > /dev/null || { echo "$0: $tool is not installed: apt-get install $tool" >&2; exit 1; }
done
[ "$(id -u)" = 0 ] || { echo "$0: expected to run as root, for chroot" >&2; exit 1; }
export BUILDAH_ISOLATION=chroot
suite=bookworm
base=localhost/ntm-serving/base:$suite

bootstrap() {
  local root mirror container
  root=$(mktemp -d)
  mirror=$({ cat /etc/apt/sources.list /etc/apt/sources.list.d/*.{list,sources} 2> /dev/null || true; } \
    | sed -n 's/^URIs: *//p; s/^deb \([a-z]*:[^ ]*\) .*/\1/p' | awk 'NR == 1')
  debootstrap --variant=minbase $suite "$root" "$mirror"
  rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/var/log/* "$root"/usr/share/{doc,man,locale,info,lintian,bug}/*
  container=$(buildah from scratch)
  buildah add -q "$container" "$root" / > /dev/null
  buildah commit -q --rm "$container" $base
  rm -rf "$root"
}

pip_settings() {  # the options that give the build this machine's pip
  local folder=build/pip cert path
  mkdir -p $folder
  cert=$(python3 -m pip config get global.cert 2> /dev/null || echo /etc/ssl/certs/ca-certificates.crt)
  cp "$cert" $folder/ca.crt
  { echo "[global]"; echo "cert = /run/pip/ca.crt"; } > $folder/pip.conf
  python3 -m pip config list | sed -n "s/^global\.\(index-url\|extra-index-url\|find-links\)='\(.*\)'$/\1 = \2/p" | sed 's/\\n/ /g' >> $folder/pip.conf
  echo "--volume $PWD/$folder:/run/pip:ro --volume $PWD/$folder/pip.conf:/etc/pip.conf:ro"
  # Folders that it names have to be there too.
  { sed -n 's/^[a-z-]* = //p' $folder/pip.conf | tr ' ' '\n' | sed 's#^file://##' | grep '^/' | grep -v '^/run/' || true; } \
    | while read -r path; do path=/$(echo "${path#/}" | cut -d/ -f1-2); echo "--volume $path:$path:ro"; done | sort -u
}

buildah inspect --type image $base > /dev/null 2>&1 || bootstrap
for target in "${@:-gateway}"; do
  # shellcheck disable=SC2046
  buildah build --format docker --layers --target "$target" --build-arg BASE=$base \
    --build-arg REVISION="$(git rev-parse HEAD 2> /dev/null || echo unknown)" ${TRAINER:+--build-arg TRAINER="$TRAINER"} \
    $(pip_settings) --tag "localhost/ntm-serving/$target:0.1.0" .
  buildah images "localhost/ntm-serving/$target:0.1.0"
done
