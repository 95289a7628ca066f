"""The options of a command line that say where an export goes."""

import argparse
from pathlib import Path

from training.exporting.publication import Target


def add_target(to: argparse.ArgumentParser) -> None:
    """The options that say where an export goes."""
    help_dir = "where models are served from (default: models)"
    to.add_argument("--export-dir", type=Path, default=Path("models"), metavar="DIR", help=help_dir)
    to.add_argument("--name", default=None, help="the exported model's name (default: the task's)")
    help_version = "its version; one that is there is never overwritten (default: the next free one)"
    to.add_argument("--version", type=int, default=None, metavar="N", help=help_version)


def target_of(options: argparse.Namespace, task: str) -> Target:
    """What was given; a model without a name is called after its task."""
    return Target(options.export_dir, options.name or task, options.version)
