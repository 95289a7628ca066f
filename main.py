"""`python main.py [-v] ntm|dense|lstm`: the copy task, as the layer that this project succeeds was tried out.

Trains the network, then prints its accuracy at each test length; with ``-v`` after every epoch too.
`training/train.py` has everything else.
"""

import argparse
import sys
from collections.abc import Sequence

from training import train

# The ancestor's names of networks and controllers, and the trainer's.
_CONTROLLERS = {"dense": "ntm", "double_dense": "ntm-double-dense", "lstm": "ntm-lstm"}
_BASELINES = {"dense": "dense", "lstm": "lstm-stack"}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="main.py", description=__doc__.splitlines()[0])
    add = result.add_argument
    add("modelname", choices=("ntm", "dense", "lstm"), help="the network to train")
    add("-e", "--epochs", type=int, default=None, metavar="N", help="epochs at most (default: until it is solved)")
    controller = "the NTM's controller (default: dense)"
    add("-c", "--ntm_controller_architecture", choices=_CONTROLLERS, default="dense", help=controller)
    add("-v", "--verbose", action="store_true", help="the accuracy at each test length after every epoch too")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses and trains. Returns the exit status: 0, whatever the network has learned; 2 for a bad option."""
    return 0 if (status := train.main(translated(parser().parse_args(arguments)))) == 1 else status


def translated(options: argparse.Namespace) -> list[str]:
    """The same for `training/train.py`."""
    controller = options.ntm_controller_architecture
    kind = _CONTROLLERS[controller] if options.modelname == "ntm" else _BASELINES[options.modelname]
    epochs = [] if options.epochs is None else ["--epochs", str(options.epochs)]
    verbose = ["--verbose"] if options.verbose else []
    return ["--task", "copy", "--model", kind, "--no-export", *epochs, *verbose]


if __name__ == "__main__":
    sys.exit(main())
