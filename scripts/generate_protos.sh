#!/usr/bin/env bash
# Regenerates the Python code and the type stubs of protos/. `make lint` runs it and fails if anything changed.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
PATH="$(cd "$(dirname "$python")" && pwd):$PATH" # protoc finds protoc-gen-mypy and protoc-gen-mypy_grpc there
common="$("$python" -c 'import google.rpc.status_pb2 as m, pathlib; print(pathlib.Path(m.__file__).parents[2])')"
protoc=("$python" -m grpc_tools.protoc -I protos -I "$common")
"${protoc[@]}" --python_out=protos --mypy_out=quiet:protos protos/ntm_serving/v1/*.proto
"${protoc[@]}" --grpc_python_out=protos --mypy_grpc_out=quiet:protos protos/ntm_serving/v1/*_service.proto
