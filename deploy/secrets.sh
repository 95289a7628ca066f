#!/usr/bin/env bash
# deploy/secrets.sh DIRECTORY: makes the secrets of a deployment with a Valkey of its own, new ones, as files.
#
#   users.acl     of the Valkey: the gateways' user and what it may do, with the hash of its password
#   store-url     where the gateways find it, password included
#   gateway.env   the same, as a container engine's env file
#   snapshots     32 random bytes that authenticate snapshots and page tokens
#
# STORE_HOST (valkey:6379) is the Valkey's address. Nothing is overwritten.
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: $0 DIRECTORY" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
[ ! -e "$1/users.acl" ] || { echo "$0: $1 has secrets already" >&2; exit 1; }
# The directory keeps others out; the files are mounted into containers whose users are others.
mkdir -p "$1"
chmod 700 "$1"
password=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')
hash=$(printf %s "$password" | sha256sum | cut -d ' ' -f 1)
printf 'redis://gateway:%s@%s/0' "$password" "${STORE_HOST:-valkey:6379}" > "$1/store-url"
printf 'NTM_STORE=%s\n' "$(cat "$1/store-url")" > "$1/gateway.env"
head -c 32 /dev/urandom > "$1/snapshots"
sed "s/SHA256_OF_PASSWORD/$hash/" "$here/valkey/users.acl" > "$1/users.acl"
