"""The trained networks that are kept in results/: docs/results.md quotes the tables that lie beside them."""

import json
from pathlib import Path

import keras
import pytest

import ntm  # noqa: F401  the layer has to be registered before a model with it is loaded
from training.config import BASELINES, RunConfig
from training.evaluation import Evaluator

RESULTS = Path(__file__).parents[2] / "results"
KEPT = sorted(path.parent for path in RESULTS.glob("*/best.keras"))


def test_there_are_networks():
    assert KEPT


@pytest.mark.parametrize("run", KEPT, ids=lambda run: run.name)
def test_a_kept_network_gives_its_table_again(run):
    config = RunConfig.load(run)
    task = config.make_task()
    kept = json.loads((run / "evaluation.json").read_text())
    rows = {tuple(row["size"]): row for row in kept["rows"]}
    assert list(rows) == list(task.sizes())
    size = task.sizes()[0]
    found = Evaluator(keras.saving.load_model(run / "best.keras"), compiled=False).row(
        task, size, sequences=rows[size]["sequences"], seed=kept["seed"]
    )
    assert found.asked_bits == rows[size]["asked_bits"]
    # The same sequences; another processor rounds otherwise, which may turn a bit that was near a half.
    assert found.wrong_bits == pytest.approx(rows[size]["wrong_bits"], rel=0.01, abs=0.01)
    assert found.loss_bits == pytest.approx(rows[size]["loss_bits"], rel=0.01, abs=0.05)


@pytest.mark.parametrize("run", KEPT, ids=lambda run: run.name)
def test_a_kept_network_is_small_and_its_curve_is_beside_it(run):
    # A network with a memory is small whatever it remembers; what the baseline remembers is in its layers.
    limit = 6_000_000 if RunConfig.load(run).model.kind in BASELINES else 1_000_000
    assert (run / "best.keras").stat().st_size < limit
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["sequences"] < lines[-1]["sequences"]
