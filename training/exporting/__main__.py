"""`python -m training.exporting RUN`: exports a trained network, whatever backend it was trained on, to be served."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# The export is a SavedModel: it is TensorFlow's to write.
os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from training.checks import ConfigError
from training.config import RunConfig
from training.exporting.command import export_run
from training.exporting.options import add_target, target_of


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m training.exporting", description=__doc__)
    add = result.add_argument
    add("run", type=Path, help="the directory of a run, with best.keras in it")
    add_target(result)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses and exports. Returns the exit status: 0, or 2 for what cannot be exported."""
    options = parser().parse_args(arguments)
    try:
        path = export_run(options.run, target_of(options, RunConfig.load(options.run).task))
    except (ConfigError, ValueError, FileExistsError) as error:
        print(f"{parser().prog}: {error}", file=sys.stderr)
        return 2
    print(f"exported: {os.path.relpath(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
