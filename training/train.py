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

from training.checks import ConfigError
from training.config import MODELS, RunConfig
from training.exporting.options import add_target, target_of
from training.exporting.publication import Target
from training.presets import PRESETS, preset
from training.settings import with_settings
from training.tasks import TASKS

_EPILOG = """examples:
  python training/train.py                                  solve copy (a minute or two), export it as models/copy/1
  python training/train.py --task copy --model ntm -v       the same, with the accuracies as it goes on
  python training/train.py --set task.max_length=10 --set recipe.settle_steps=500
                                                            another task or recipe than the preset's
  python training/train.py --model lstm --no-export         the baseline without a memory
  python training/train.py --run-dir runs/mine              and the same again after an interruption: it goes on
  python training/evaluate.py runs/copy-ntm-quick-0         the table of lengths, and the pictures
  tensorboard --logdir runs                                 the curves, also while it trains
  KERAS_BACKEND=jax python training/train.py                on another of Keras's backends
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="train.py",
        description="Trains a Neural Turing Machine, or an LSTM to compare it with, and exports it to be served.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_what(result)
    _add_where(result)
    add = result.add_argument
    add("--batch-size", type=int, default=None, metavar="N", help="sequences in an update (default: the preset's)")
    add("--attempts", type=int, default=None, metavar="N", help="networks that may be started (default: the preset's)")
    setting = "another value for a field of the configuration, GROUP one of task, model, recipe; may be repeated"
    add("--set", action="append", default=[], dest="settings", metavar="GROUP.FIELD=VALUE", help=setting)
    epochs = "stop after so many looks at the loss; the same again with a higher number goes on (default: to the end)"
    add("-e", "--epochs", type=int, default=None, metavar="N", help=epochs)
    changed = "go on with the run in its directory, of another recipe until now, under this one"
    add("--new-recipe", action="store_true", help=changed)
    parallel = "spread every batch over all devices, and over the hosts that TF_CONFIG names"
    add("--data-parallel", action="store_true", help=parallel)
    verbose = "after every epoch a line, and the accuracy at each test length"
    add("-v", "--verbose", action="store_true", help=verbose)
    return result


def _add_what(to: argparse.ArgumentParser) -> None:
    to.add_argument("--task", choices=TASKS, default="copy", help="what to learn (default: copy)")
    to.add_argument("--model", choices=MODELS, default="ntm", help="the network (default: ntm, a dense controller)")
    presets = "quick: the fastest recipe known here (default); paper: the paper's"
    to.add_argument("--preset", choices=PRESETS, default="quick", help=presets)
    to.add_argument("--seed", type=int, default=0, help="of weights, data and noise (default: 0)")


def _add_where(to: argparse.ArgumentParser) -> None:
    log_dir = "where runs are kept (default: $NTM_LOG_DIR, $LOGDIR_BASE or runs)"
    to.add_argument("--log-dir", type=Path, default=None, metavar="DIR", help=log_dir)
    run_dir = "this run's directory; an interrupted run in it goes on (default: LOG_DIR/TASK-MODEL-PRESET-SEED)"
    to.add_argument("--run-dir", type=Path, default=None, metavar="DIR", help=run_dir)
    add_target(to)
    to.add_argument("--no-export", action="store_true", help="train only")
    to.add_argument("--only-solved", action="store_true", help="export nothing unless the task was solved")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses, trains, exports. Returns the exit status: 0; 1 if the task was not solved; 2 for a bad option."""
    options = parser().parse_args(arguments)
    try:
        config = _config(options)
        target = None if options.no_export else target_of(options, config.task)
        _check(options, target)
    except (ConfigError, ValueError, FileExistsError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    # Imported late: --help and a refused option need no Keras.
    from training.command import run_training

    return run_training(
        config,
        _run_dir(options),
        target=target,
        only_solved=options.only_solved,
        verbose=options.verbose,
        epochs=options.epochs,
        data_parallel=options.data_parallel,
        new_recipe=options.new_recipe,
    )


def _check(options: argparse.Namespace, target: Target | None) -> None:
    """Refuses what would fail after the training."""
    if options.epochs is not None and options.epochs < 1:
        raise ConfigError(f"epochs should be an integer of at least 1; received {options.epochs}")
    if target is None:
        return
    target.check()
    if options.model == "dense":
        raise ConfigError("a dense network has no state that could be served; expected --no-export with it")


def _config(options: argparse.Namespace) -> RunConfig:
    """The preset, with the options given on the command line."""
    config = preset(options.preset, task=options.task, model=options.model, seed=options.seed)
    given = {name: getattr(options, name) for name in ("batch_size", "attempts")}
    changes = {name: value for name, value in given.items() if value is not None}
    config = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, **changes))
    return with_settings(config, options.settings)


def _run_dir(options: argparse.Namespace) -> Path:
    """Given, or named after what is trained."""
    if options.run_dir is not None:
        return Path(options.run_dir)
    log_dir = options.log_dir or Path(os.environ.get("NTM_LOG_DIR") or os.environ.get("LOGDIR_BASE") or "runs")
    return Path(log_dir) / f"{options.task}-{options.model}-{options.preset}-{options.seed}"


if __name__ == "__main__":
    sys.exit(main())
