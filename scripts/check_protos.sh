#!/usr/bin/env bash
# Fails if the generated code is not what protos/*.proto give: regenerates it in a copy and compares.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHON="$(cd "$(dirname "${PYTHON:-.venv/bin/python}")" && pwd)/python"
copy="$(mktemp -d)"
trap 'rm -rf "$copy"' EXIT
mkdir "$copy/scripts"
cp -r protos "$copy/"
find "$copy/protos" -name '*_pb2*' -delete
cp scripts/generate_protos.sh "$copy/scripts/"
"$copy/scripts/generate_protos.sh"
diff -r -x __pycache__ protos "$copy/protos" || {
  echo "the generated code differs from its protos: run 'make protos' and commit" >&2
  exit 1
}
