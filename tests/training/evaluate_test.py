import json
import shutil
from pathlib import Path

import pytest

from training import evaluate, plots
from training.config import ModelConfig, Recipe, RunConfig
from training.loop import train_and_evaluate
from training.results import Row


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """An NTM and an LSTM after a few updates, in directories of those names."""
    directory = tmp_path_factory.mktemp("runs")
    for kind in ("ntm", "lstm"):
        recipe = Recipe(batch_size=2, training_slots=None, chunk=2, validate_every=2, compiled=False)
        model = ModelConfig(kind=kind, units=5, layers=1, n_slots=6, m_depth=3)
        config = RunConfig(task_options=tiny.task_options, model=model, recipe=recipe)
        train_and_evaluate(config, directory / kind, max_updates=4)
    return directory


def test_the_table_is_printed_and_kept_and_the_pictures_are_drawn(runs, capsys):
    arguments = [str(runs / "ntm"), str(runs / "lstm"), "--sequences", "3"]
    assert evaluate.main(arguments) == 0
    told = capsys.readouterr().out
    tables = [json.loads((runs / kind / "evaluation.json").read_text()) for kind in ("ntm", "lstm")]
    for table in tables:
        assert [row["size"] for row in table["rows"]] == [[5], [10], [20], [40], [60], [80], [120]]
        assert all(row["sequences"] == 3 and row["asked_bits"] == 2 * row["size"][0] for row in table["rows"])
        assert all(f"{row['wrong_bits']:.4f}" in told for row in table["rows"])
    assert tables[0]["rows"] != tables[1]["rows"]
    for name in ("learning", "generalisation", "memory"):
        picture = runs / "ntm" / f"{name}.png"
        assert picture.stat().st_size > 10_000
        assert picture.name in told
    assert not list((runs / "lstm").glob("*.png"))


def test_the_whole_table_fits_into_a_terminal_of_eighty_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    row = Row((20, 16), 1000, 1809.0, 1335.1234, 335.5, 13518.125, 0.125, 131.379)
    evaluate.print_table(Path("results/priority-sort-ntm-lstm"), [row])
    told = capsys.readouterr().out
    for cell in ("20x16", "1,000 sequences", "1809", "1335.1234", "335.5", "26.196", "13518.125", "12.5", "131.379"):
        assert cell in told


def test_the_same_seed_gives_the_same_table_also_from_nothing_but_the_network(runs, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "best.keras"):
        shutil.copy(runs / "ntm" / name, bare)
    for run, output in ((runs / "ntm", "a"), (bare, "b")):
        assert evaluate.main([str(run), "--sequences", "2", "--seed", "5", "--output", str(tmp_path / output)]) == 0
    assert (tmp_path / "a" / "evaluation.json").read_text() == (tmp_path / "b" / "evaluation.json").read_text()
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"evaluation.json", "generalisation.png", "memory.png"}
    assert {path.name for path in bare.iterdir()} == {"config.json", "best.keras"}


def test_a_task_with_an_optimal_predictor_is_drawn_against_it():
    rows = [Row((50,), 10, 50.0, 12.0, 12.0, loss, 0.0, 40.0) for loss in (40.0, 42.0)]
    assert [plots._fault(row) for row in rows] == pytest.approx([0.0, 5.0])
    assert plots._fault(rows[0]._replace(optimal_bits=None)) == pytest.approx(24.0)


@pytest.mark.parametrize("arguments", [["--sequences", "0"], ["elsewhere"]])
def test_what_cannot_be_measured_is_refused(runs, arguments, capsys):
    assert evaluate.main([str(runs / "ntm"), *arguments]) == 2
    assert capsys.readouterr().err.startswith("evaluate.py: ")
