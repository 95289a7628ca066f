"""Takes out of an installed environment what nothing imports while it serves: ``python scripts/slim.py ENVIRONMENT``.

The packages' own test suites, the sources and headers for building against them, and type stubs.
"""

import shutil
import sys
from pathlib import Path

_FOLDERS = ("tests", "include")
_SUFFIXES = (".pyi", ".pyx", ".pxd", ".c", ".h", ".a")


def slim(environment: Path) -> int:
    """Returns how many bytes were taken out."""
    packages = [*environment.glob("lib/python3*/site-packages")]
    if not packages:
        raise ValueError(f"expected a virtual environment; {environment} has no lib/python3*/site-packages")
    taken = 0
    for path in sorted(path for root in packages for path in root.rglob("*")):
        if path.is_dir() and path.name in _FOLDERS:
            taken += sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            shutil.rmtree(path)
        elif path.is_file() and path.suffix in _SUFFIXES:
            taken += path.stat().st_size
            path.unlink()
    return taken


if __name__ == "__main__":
    print(f"{slim(Path(sys.argv[1])) / 1e6:.1f} MB taken out")
