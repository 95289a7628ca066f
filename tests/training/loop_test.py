import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training.checks import ConfigError
from training.config import RunConfig
from training.loop import train_and_evaluate
from training.tasks import TASKS
from training.tasks.copy import CopyTask

REPOSITORY = Path(__file__).resolve().parents[2]


def saved(run_dir):
    """All variables of a run's checkpoint, as bytes."""
    with np.load(run_dir / "checkpoint.npz") as arrays:
        return {name: arrays[name].tobytes() for name in arrays.files}


def metrics(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A run from beginning to end: its directory, result and reports."""
    run_dir, reports = tmp_path_factory.mktemp("whole"), []
    return run_dir, train_and_evaluate(tiny, run_dir, on_report=reports.append), reports


def test_a_run_goes_through_its_phases_and_leaves_all_that_belongs_to_it(tiny, whole):
    run_dir, result, reports = whole
    assert not result.solved, "a few updates cannot solve it"
    assert result.attempts == tiny.recipe.attempts
    # Learned after the first chunk, then settling, for each of two networks.
    assert result.updates == 2 * (2 + 6)
    assert result.sequences == 2 * result.updates
    assert [report.position.step for report in reports] == [2, 4, 6, 8] * 2
    assert all(report.validation is not None for report in reports)
    assert RunConfig.load(run_dir) == tiny
    assert len(metrics(run_dir)) == 8
    assert json.loads((run_dir / "result.json").read_text())["updates"] == result.updates
    assert result.validation_wrong_bits == min(report.validation for report in reports)


def test_the_network_kept_has_the_full_memory_and_the_best_weights(tiny, whole):
    run_dir, result, _ = whole
    loaded = keras.saving.load_model(run_dir / "best.keras")
    assert loaded.get_layer("ntm").cell.n_slots == tiny.model.n_slots
    inputs = np.random.default_rng(0).random((3, 9, 4)).astype(np.float32)
    came, expected = (keras.ops.convert_to_numpy(model(inputs)) for model in (loaded, result.model))
    assert np.array_equal(came, expected)


def test_a_resumed_run_ends_with_the_same_bits_as_one_that_was_not_interrupted(tiny, whole, tmp_path):
    for updates in (4, 10):  # Inside the settling of the first network, and of the second: noise, average and all.
        train_and_evaluate(tiny, tmp_path, max_updates=updates)
    train_and_evaluate(tiny, tmp_path)
    assert saved(tmp_path) == saved(whole[0])
    assert metrics(tmp_path) == metrics(whole[0])


def test_until_the_first_validation_the_network_kept_is_the_last_one(tiny, tmp_path):
    config = dataclasses.replace(tiny, recipe=dataclasses.replace(tiny.recipe, learned_below=1e-9))
    result, first = train_and_keep(config, tmp_path, updates=2)
    assert result.validation_wrong_bits is None
    _, second = train_and_keep(config, tmp_path, updates=4)
    assert second != first


def test_after_it_the_network_kept_is_the_best_one_validated(tiny, tmp_path):
    config = dataclasses.replace(tiny, recipe=dataclasses.replace(tiny.recipe, validate_every=6))
    result, first = train_and_keep(config, tmp_path, updates=2)
    assert result.validation_wrong_bits is not None, "validated as soon as it has learned"
    _, second = train_and_keep(config, tmp_path, updates=4)
    assert second == first


def train_and_keep(config, run_dir, *, updates):
    """The result of a call, and the weights of the network kept: the same there and in the run's directory."""
    result = train_and_evaluate(config, run_dir, max_updates=updates)
    models = (result.model, keras.saving.load_model(run_dir / "best.keras"))
    returned, saved = ([np.asarray(v).tolist() for v in model.trainable_variables] for model in models)
    assert returned == saved
    return result, returned


def test_a_network_searches_on_the_sequences_of_the_training_and_settles_on_the_hard_ones(tiny, tmp_path, monkeypatch):
    drawn = []

    class Recording(CopyTask):
        def training_batch(self, generator, batch_size, difficulty=1.0):
            drawn.append("training")
            return super().training_batch(generator, batch_size, difficulty)

        def hard_batch(self, generator, batch_size):
            drawn.append("hard")
            return super().hard_batch(generator, batch_size)

    monkeypatch.setitem(TASKS, "copy", Recording)
    train_and_evaluate(tiny, tmp_path)
    # Two networks, each of which learns after its first two updates and settles for six.
    assert drawn == 2 * (2 * ["training"] + 6 * ["hard"])


def test_tensorboard_shows_the_same_as_the_lines(tiny, whole, tmp_path):
    for updates in (4, None):  # Taken up again, nothing is shown twice.
        train_and_evaluate(tiny, tmp_path, max_updates=updates)
    lines = metrics(tmp_path)
    for name in ("bits_per_sequence", "validation"):
        events = EventAccumulator(str(tmp_path)).Reload().Tensors(name)
        assert [event.step for event in events] == [line["updates"] for line in lines]
        assert [event.tensor_proto.float_val[0] for event in events] == pytest.approx([line[name] for line in lines])


def test_at_a_loss_that_is_no_number_the_last_good_weights_are_kept(tiny, tmp_path):
    """Settling begins after the first chunk, at a rate that no weight survives."""
    recipe = dataclasses.replace(tiny.recipe, settle_rate=3e38, attempts=1)
    config = dataclasses.replace(tiny, recipe=recipe)
    good = train_and_evaluate(config, tmp_path / "good", max_updates=2)
    result = train_and_evaluate(config, tmp_path / "run")
    assert (result.spoilt, result.solved, result.updates) == (1, False, 2)
    for kept, expected in zip(result.model.trainable_variables, good.model.trainable_variables, strict=True):
        np.testing.assert_array_equal(kept, expected)
    assert metrics(tmp_path / "run")[-1]["spoilt"] == 1
    with np.load(tmp_path / "run" / "checkpoint.npz") as arrays:
        assert all(np.isfinite(arrays[name]).all() for name in arrays.files if name != "position")
    assert train_and_evaluate(config, tmp_path / "run").updates == 2, "it is over, and stays so"


def test_a_network_spoilt_at_once_gives_way_to_the_next(tiny, tmp_path):
    config = dataclasses.replace(tiny, recipe=dataclasses.replace(tiny.recipe, learning_rate=3e38))
    result = train_and_evaluate(config, tmp_path)
    assert (result.spoilt, result.attempts) == (2, 2)
    assert all(np.isfinite(variable).all() for variable in result.model.trainable_variables)


def test_another_seed_gives_other_weights_and_other_data(tiny, whole, tmp_path):
    train_and_evaluate(dataclasses.replace(tiny, seed=2), tmp_path, max_updates=2)
    assert metrics(tmp_path)[0] != metrics(whole[0])[0]


def test_a_directory_with_another_run_is_refused(tiny, whole):
    with pytest.raises(ConfigError, match="another configuration"):
        train_and_evaluate(dataclasses.replace(tiny, seed=9), whole[0])


@pytest.mark.slow
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bits(tiny, tmp_path):
    config = dataclasses.replace(
        tiny, recipe=dataclasses.replace(tiny.recipe, settle_steps=120, attempts=1, compiled=True)
    )
    (tmp_path / "config.json").write_text(config.to_json())
    code = (
        "import sys; from pathlib import Path; from training.config import RunConfig;"
        "from training.loop import train_and_evaluate;"
        "train_and_evaluate(RunConfig.load(Path(sys.argv[1])), Path(sys.argv[1]) / 'run')"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=REPOSITORY)
    wait_for(lambda: (tmp_path / "run" / "checkpoint.npz").exists(), process)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    train_and_evaluate(config, tmp_path / "run")
    train_and_evaluate(config, tmp_path / "whole")
    assert saved(tmp_path / "run") == saved(tmp_path / "whole")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
