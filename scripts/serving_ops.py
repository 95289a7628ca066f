"""Writes what TensorFlow knows of its operations as JSON: run under the release that the model servers run.

The export is held to that list (training/exporting/portability.py). To move to another release:

    python3 -m venv /tmp/tf && /tmp/tf/bin/pip install tensorflow==2.19.1
    /tmp/tf/bin/python scripts/serving_ops.py > training/exporting/serving_ops.json
"""

import json
import sys

import tensorflow as tf
from tensorflow.python.framework import op_def_registry
from tensorflow.python.framework.kernels import get_all_registered_kernels


def main() -> None:
    """One entry for each operation that has a kernel: its attributes, and whether a GPU runs it."""
    devices: dict[str, set[str]] = {}
    for kernel in get_all_registered_kernels().kernel:
        devices.setdefault(kernel.op, set()).add(kernel.device_type)
    known = {name: op_def_registry.get(name) for name in devices}
    operations = {
        name: {"attributes": sorted(a.name for a in op.attr), "gpu": bool(devices[name] & {"GPU", "DEFAULT"})}
        for name, op in sorted(known.items())
        if op is not None
    }
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in operations.items())
    sys.stdout.write(f'{{\n  "tensorflow": "{tf.__version__}",\n  "operations": {{\n{lines}\n  }}\n}}\n')


if __name__ == "__main__":
    main()
