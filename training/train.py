"""`python training/train.py`: trains a network on one of the paper's tasks, and exports it to be served."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # Run as a file: its own directory gives way to the project's.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from training.config import MODELS, ConfigError, RunConfig
from training.presets import PRESETS, preset
from training.tasks import TASKS

_EPILOG = """examples:
  python training/train.py                                  solve copy (a minute or two), export it as models/copy/1
  python training/train.py --seed 3 --no-export -v          another start, nothing exported, a line for each look
  python training/train.py --model lstm                     the baseline without a memory
  python training/train.py --run-dir runs/mine              and the same again after an interruption: it goes on
  python training/evaluate.py runs/copy-ntm-quick-0         the table of lengths, and the pictures
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="train.py",
        description="Trains a Neural Turing Machine, or an LSTM to compare it with, and exports it to be served.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("--task", choices=TASKS, default="copy", help="what to learn (default: copy)")
    add("--model", choices=MODELS, default="ntm", help="the network (default: ntm, with a dense controller)")
    add(
        "--preset",
        choices=PRESETS,
        default="quick",
        help="quick: the fastest recipe known here (default); paper: the paper's",
    )
    add("--seed", type=int, default=0, help="of weights, data and noise (default: 0)")
    add("--log-dir", type=Path, default=None, metavar="DIR", help="where runs are kept (default: $NTM_LOG_DIR or runs)")
    run_dir_help = "this run's directory; an interrupted run in it goes on (default: LOG_DIR/TASK-MODEL-PRESET-SEED)"
    add("--run-dir", type=Path, default=None, metavar="DIR", help=run_dir_help)
    add(
        "--export-dir",
        type=Path,
        default=Path("models"),
        metavar="DIR",
        help="where models are served from (default: models)",
    )
    add("--name", default=None, help="the exported model's name (default: the task's)")
    add("--no-export", action="store_true", help="train only")
    add("--only-solved", action="store_true", help="export nothing unless the task was solved")
    add("--batch-size", type=int, default=None, metavar="N", help="sequences in an update (default: the preset's)")
    add("--attempts", type=int, default=None, metavar="N", help="networks that may be started (default: the preset's)")
    add("-v", "--verbose", action="store_true", help="a line for each look at the loss")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses, trains, exports. Returns the exit status: 0; 1 if the task was not solved; 2 for a bad option."""
    options = parser().parse_args(arguments)
    try:
        config = _config(options)
    except (ConfigError, ValueError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    # Imported late: --help and a refused option need no TensorFlow.
    from training.command import run_training

    return run_training(
        config,
        _run_dir(options),
        export_dir=None if options.no_export else options.export_dir,
        name=options.name or config.task,
        only_solved=options.only_solved,
        verbose=options.verbose,
    )


def _config(options: argparse.Namespace) -> RunConfig:
    """The preset, with the options given on the command line."""
    config = preset(options.preset, task=options.task, model=options.model, seed=options.seed)
    given = {name: getattr(options, name) for name in ("batch_size", "attempts")}
    changes = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, **changes))


def _run_dir(options: argparse.Namespace) -> Path:
    """Given, or named after what is trained."""
    if options.run_dir is not None:
        return Path(options.run_dir)
    log_dir = options.log_dir or Path(os.environ.get("NTM_LOG_DIR") or "runs")
    return Path(log_dir) / f"{options.task}-{options.model}-{options.preset}-{options.seed}"


if __name__ == "__main__":
    sys.exit(main())
