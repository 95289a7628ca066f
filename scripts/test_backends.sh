#!/usr/bin/env bash
# Runs the layer's tests on TensorFlow, JAX and PyTorch, and holds the three to the same numbers: the first backend writes
# weights, inputs and results to a file, the others compare with it. Makes the environment if it is missing.
# Usage: scripts/test_backends.sh [pytest arguments]     (BACKENDS="jax torch" runs only those)
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv-backends
if [ ! -f "$venv/.ready" ] || [ ! -d "$venv"/lib/python*/site-packages/xdist ]; then
  echo "making the environment with JAX and PyTorch in $venv (some minutes)"
  "${PYTHON:-python3}" -m venv "$venv"
  PIP_CONSTRAINT=constraints.txt "$venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 jax==0.10.2 \
    keras tensorflow tensorboard numpy h5py matplotlib hypothesis pytest pytest-asyncio pytest-timeout pytest-xdist
  touch "$venv/.ready"
fi

parallel=(-n auto --maxprocesses 4 --dist loadfile)
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
# PyTorch waits busily on every core it is given, which on a shared machine makes it hundreds of times slower.
export OMP_NUM_THREADS=1 TF_CPP_MIN_LOG_LEVEL=3 TF_ENABLE_ONEDNN_OPTS=0
# Most of the time on JAX is compilation, much of it of the same small graphs again: hence its cache on disk.
export JAX_COMPILATION_CACHE_DIR="$PWD/$venv/jax-cache" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 \
  JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
for backend in ${BACKENDS:-tensorflow jax torch}; do
  echo "== $backend"
  # JAX computes in float64, as the comparison with the oracle needs, only when told so. Loading what was exported needs
  # the export, which this environment lacks: `make test` does it.
  KERAS_BACKEND="$backend" NTM_REFERENCE="$scratch/reference.npz" JAX_ENABLE_X64=1 \
    "$venv/bin/python" -m pytest "${parallel[@]}" tests/ntm --ignore=tests/ntm/loading_test.py "$@"
done
# The training loop: phases, resuming after kill -9 to the same bits, and losses that are no number.
if [[ " ${BACKENDS:-jax} " == *" jax "* ]]; then
  KERAS_BACKEND=jax "$venv/bin/python" -m pytest "${parallel[@]}" tests/training/loop_test.py tests/training/steps/scans_test.py
fi
# The trainer and the export, from the environment of the tests: the other backends in processes of their own.
if [ -x .venv/bin/python ]; then
  .venv/bin/python -m pytest "${parallel[@]}" tests/training/steps tests/training/export_test.py -k "backend or devices"
fi
