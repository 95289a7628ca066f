"""Carries TensorFlow's generated protobuf modules out of its wheel: all of TensorFlow that a gateway needs.

``python scripts/carry_serving_protos.py WHEELS TARGET`` writes every ``tensorflow/**/*_pb2.py`` of the TensorFlow wheel
in WHEELS to TARGET. Beside ``tensorflow-serving-api`` they let the gateway talk to TensorFlow Serving
(service/executors/serving_protos.py).
"""

import sys
import zipfile
from pathlib import Path


def carry(wheels: Path, target: Path) -> int:
    """Returns how many modules were written.

    Raises:
        ValueError: there is not exactly one wheel, or it has no generated modules.
    """
    found = sorted(wheels.glob("tensorflow-*.whl"))
    if len(found) != 1:
        raise ValueError(f"expected one tensorflow-*.whl in {wheels}; got {[path.name for path in found]}")
    with zipfile.ZipFile(found[0]) as wheel:
        names = [name for name in wheel.namelist() if name.startswith("tensorflow/") and name.endswith("_pb2.py")]
        if not names:
            raise ValueError(f"expected tensorflow/**/*_pb2.py in {found[0].name}; it has none")
        wheel.extractall(target, names)
    return len(names)


if __name__ == "__main__":
    count = carry(Path(sys.argv[1]), Path(sys.argv[2]))
    print(f"{count} generated modules")
