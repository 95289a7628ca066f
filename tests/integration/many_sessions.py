"""Many sessions of three models through whole gateways: every output is what the whole sequence gives.

``python tests/integration/many_sessions.py --sessions 500`` runs them on a gateway that executes the models itself,
and on one before ``ntm-model-server``. Sessions are stepped in random chunks of 1 to 50 time steps, in random order;
now and then one is forked, or put into a snapshot that a new one is restored from, and each goes its own way.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from service.client import SequenceClient, Session  # noqa: E402 - after the path that makes this a script
from tests.integration import models  # noqa: E402
from tests.integration.processes import Gateway  # noqa: E402
from tests.service.model_server.processes import running_model_server  # noqa: E402

LONGEST_CHUNK = 50
AT_ONCE = 64  # sessions that are stepped in one call, at the most
FORKS, SNAPSHOTS = 0.05, 0.05  # chances of each, for each chunk
FAULTS = ("swapped states", "no reset", "skipped slice")


@dataclass
class Walk:
    """A session on its way: all that it is fed from the beginning, and what it said from time step ``since`` on."""

    kind: str
    session: Session
    inputs: np.ndarray
    since: int = 0
    outputs: list[np.ndarray] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return self.session.position == len(self.inputs)

    def next_chunk(self, rng: np.random.Generator) -> np.ndarray:
        begin = self.session.position
        return self.inputs[begin : begin + int(rng.integers(1, LONGEST_CHUNK + 1))]


def random_inputs(rng: np.random.Generator) -> np.ndarray:
    length = int(rng.integers(LONGEST_CHUNK, 3 * LONGEST_CHUNK))
    return rng.normal(size=(length, models.INPUT_DIM)).astype(np.float32)


def branch(walk: Walk, session: Session, position: int, rng: np.random.Generator) -> Walk:
    """A session that shares its past with ``walk`` up to ``position``, and goes its own way from there."""
    inputs = np.concatenate([walk.inputs[:position], random_inputs(rng)])
    return Walk(walk.kind, session, inputs, since=position)


def step_all(client: SequenceClient, count: int, rng: np.random.Generator) -> list[Walk]:
    """Opens ``count`` sessions and steps them and what branches off them to their ends."""
    kinds = [models.KINDS[number % len(models.KINDS)] for number in range(count)]
    walks = [Walk(kind, client.create_session(kind), random_inputs(rng)) for kind in kinds]
    snapshots: list[tuple[Walk, int, bytes]] = []
    while under_way := [walk for walk in walks if not walk.done]:
        most = min(AT_ONCE, len(under_way))
        chosen = [under_way[n] for n in rng.permutation(len(under_way))[: int(rng.integers(1, most + 1))]]
        steps = [(walk.session, walk.next_chunk(rng)) for walk in chosen]
        for walk, came in zip(chosen, client.step_many(steps, timeout=300), strict=True):
            walk.outputs.append(came)
        for walk in chosen:
            if rng.random() < FORKS:
                walks.append(branch(walk, walk.session.fork(), walk.session.position, rng))
            if rng.random() < SNAPSHOTS:
                snapshots.append((walk, walk.session.position, walk.session.snapshot()))
        if snapshots and rng.random() < 0.5:  # some time later, when its session has gone on
            walk, position, blob = snapshots.pop(int(rng.integers(len(snapshots))))
            walks.append(branch(walk, client.restore(blob), position, rng))
    return walks


def padded(walks: list[Walk]) -> np.ndarray:
    """``[walks, longest, input_dim]``: what each was fed, and zeros behind it, which change nothing before them."""
    inputs = np.zeros((len(walks), max(len(walk.inputs) for walk in walks), models.INPUT_DIM), np.float32)
    for row, walk in enumerate(walks):
        inputs[row, : len(walk.inputs)] = walk.inputs
    return inputs


def difference(walks: list[Walk], whole: models.Whole) -> float:
    """The largest difference of any output from that of the whole sequence."""
    worst = 0.0
    for begin in range(0, len(walks), 64):
        some = walks[begin : begin + 64]
        for wanted, walk in zip(whole(padded(some)), some, strict=True):
            came = np.concatenate(walk.outputs)
            worst = max(worst, float(np.abs(came - wanted[walk.since : len(walk.inputs)]).max()))
    return worst


def tolerance(walks: list[Walk], whole: models.Whole) -> float:
    """1e-5, or ten times what the longest of the whole sequences differ by between batches of 1 and of 64."""
    longest = sorted(walks, key=lambda walk: -len(walk.inputs))[:64]
    together = whole(padded(longest))
    apart = max(
        float(np.abs(whole(walk.inputs[None])[0] - row[: len(walk.inputs)]).max())
        for walk, row in zip(longest, together, strict=True)
    )
    return max(1e-5, 10 * apart)


def control(client: SequenceClient, kind: str, fault: str, whole: models.Whole) -> float:
    """What the comparison shows when a state goes wrong."""
    rng = np.random.default_rng(12)
    first, second = (rng.normal(size=(30, models.INPUT_DIM)).astype(np.float32) for _ in range(2))
    half = 15
    with client.session(kind) as session:
        if fault == "swapped states":  # the first half of another sequence, then the second of this one
            session.step(second[:half])
        elif fault == "no reset":  # what another sequence left
            session.step(second)
            session.step(first[:half])
        else:
            session.step(first[: half - 5])
        came = session.step(first[half:])
    return float(np.abs(came - whole(first[None])[0, half:]).max())


@contextlib.contextmanager
def embedded(model_dir: Path, folder: Path) -> Iterator[Gateway]:
    """A gateway that runs the models itself."""
    folder.mkdir(parents=True, exist_ok=True)
    with Gateway(folder, "--model-dir", str(model_dir)) as gateway:
        yield gateway


@contextlib.contextmanager
def before_model_server(model_dir: Path, folder: Path) -> Iterator[Gateway]:
    """A gateway without TensorFlow, and the model server that it runs the models on."""
    folder.mkdir(parents=True, exist_ok=True)
    with running_model_server(model_dir, folder / "server", "--no-enable-model-warmup") as server:
        names = [argument for kind in models.KINDS for argument in ("--model", kind)]
        with Gateway(folder, "--tf-serving", server.address, *names) as gateway:
            yield gateway


GATEWAYS = {"embedded": embedded, "model server": before_model_server}


def run(model_dir: Path, folder: Path, count: int, seed: int) -> bool:
    """Runs both gateways and prints a table; returns whether every figure is as it should be."""
    wholes = {kind: models.Whole(model_dir / kind / "1") for kind in models.KINDS}
    print(f"{'':14}{'model':12}{'sessions':>9}{'branches':>9}{'steps':>9}{'tolerance':>11}{'worst':>11}{'control':>11}")
    good = True
    for name, start in GATEWAYS.items():
        began = time.monotonic()
        with start(model_dir, folder / name.replace(" ", "-")) as gateway, SequenceClient(gateway.target) as client:
            walks = step_all(client, count, np.random.default_rng(seed))
            for kind, whole in wholes.items():
                mine = [walk for walk in walks if walk.kind == kind]
                worst, most = difference(mine, whole), tolerance(mine, whole)
                least = min(control(client, kind, fault, whole) for fault in FAULTS)
                branches = sum(walk.since > 0 for walk in mine)
                steps = sum(len(walk.inputs) - walk.since for walk in mine)
                good = good and worst <= most and least > 100 * most
                print(
                    f"{name:14}{kind:12}{len(mine) - branches:9}{branches:9}{steps:9,}{most:11.1e}{worst:11.1e}"
                    f"{least:11.1e}",
                    flush=True,
                )
        print(f"{name:14}{time.monotonic() - began:.0f} s")
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        models.export_all(Path(name) / "models")
        good = run(Path(name) / "models", Path(name), options.sessions, options.seed)
    print("all within the tolerance, all controls beyond it 100-fold" if good else "NOT as it should be")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
