"""The parts of the demo, against a gateway whose model copies; the whole of it runs as `make demo`."""

import asyncio
import subprocess
import sys
from pathlib import Path

import demo
import numpy as np
import pytest
from demo_parts.copying import Run, chunks, make_sequence, step_all
from demo_parts.figure import Trace, _used_slots, save_figure, trace_sequence
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

RNG = np.random.default_rng


def test_a_copy_sequence_is_flag_pattern_flag_silence():
    sequence = make_sequence(3, 8, RNG(0))
    assert sequence.inputs.shape == (8, 10)
    assert np.argwhere(sequence.inputs[:, 8:]).tolist() == [[0, 0], [4, 1]]
    np.testing.assert_array_equal(sequence.inputs[1:4, :8], sequence.target)
    assert not sequence.inputs[5:].any()
    assert sequence.length == 3


@given(length=st.integers(1, 60), seed=st.integers(0, 100))
def test_chunks_make_up_the_whole(length, seed):
    inputs = make_sequence(length, 8, RNG(seed)).inputs
    parts = list(chunks(inputs, RNG(seed)))
    assert all(1 <= len(part) <= 12 for part in parts)
    np.testing.assert_array_equal(np.concatenate(parts), inputs)


def test_bit_errors_are_counted_in_the_recall_alone():
    sequence = make_sequence(4, 8, RNG(0))
    outputs = np.ones((10, 8), np.float32)
    outputs[-4:] = sequence.target * 0.8 + 0.1
    assert Run(sequence, outputs).bit_errors == 0
    outputs[-1, :3] = 1 - outputs[-1, :3]
    assert Run(sequence, outputs).bit_errors == 3


def test_all_sequences_are_stepped_beside_each_other(copying_gateway):
    sequences = [make_sequence(length, 8, RNG(length)) for length in range(1, 61)]
    seen = []
    runs = asyncio.run(step_all(copying_gateway.target, "copy", sequences, 32, RNG(0), seen.append))
    assert [run.bit_errors for run in runs] == [0] * 60
    assert [run.sequence for run in runs] == sequences
    assert sum(seen) == sum(len(sequence.inputs) for sequence in sequences)
    assert all(run.latencies and run.seconds >= max(run.latencies) for run in runs)
    assert not copying_gateway.store._sessions


def test_a_step_that_fails_ends_the_stepping(copying_gateway):
    with pytest.raises(Exception, match="MODEL_NOT_FOUND"):
        asyncio.run(step_all(copying_gateway.target, "nobody", [make_sequence(2, 8, RNG(0))], 4, RNG(0), print))


def test_the_picture_shows_where_the_heads_were(copying_gateway, tmp_path):
    sequence = make_sequence(20, 8, RNG(0))
    trace = trace_sequence(copying_gateway.target, "copy", sequence)
    np.testing.assert_array_equal(trace.outputs[-20:], sequence.target)
    assert trace.write.argmax(axis=1)[1:21].tolist() == list(range(20))
    assert trace.read.argmax(axis=1)[22:].tolist() == list(range(20))
    save_figure(trace, tmp_path / "pictures/copy.png")
    height, width, _ = imread(tmp_path / "pictures/copy.png").shape
    assert min(height, width) > 1000


@pytest.mark.parametrize(
    ("used", "shown"),
    [([5, 6, 7], [4, 5, 6, 7, 8]), ([14, 15, 0, 1], [13, 14, 15, 0, 1, 2]), ([], range(16)), (range(16), range(16))],
)
def test_the_picture_shows_the_slots_that_were_used_round_the_end_too(used, shown):
    weighting = np.zeros((2, 16), np.float32)
    weighting[0, list(used)] = 0.5
    slots = _used_slots(Trace(make_sequence(1, 8, RNG(0)), np.zeros((4, 8)), weighting, weighting * 0))
    assert sorted(slots) == sorted(shown)
    if len(used) not in (0, 16):
        assert slots.tolist() == list(shown)


def finished(length, wrong=0):
    sequence = make_sequence(length, 8, RNG(length))
    outputs = np.zeros((2 * length + 2, 8), np.float32)
    outputs[-length:] = sequence.target
    outputs[-1, :wrong] = 1 - outputs[-1, :wrong]
    return Run(sequence, outputs, [0.01, 0.02], 0.03)


def test_the_table_adds_up(capsys):
    runs = [finished(length) for length in range(1, 61)]
    demo.show(runs, 2.0, [1e-7] * 59 + [3e-6])
    printed = capsys.readouterr().out
    assert f"{8 * sum(range(1, 61)):,}" in printed
    assert f"{sum(2 * length + 2 for length in range(1, 61)) / 2:,.0f}" in printed
    assert "3.0e-06" in printed


def test_wrong_bits_and_wrong_outputs_fail_the_demo():
    demo.check([finished(3)], [1e-7], 1e-5, 0)
    with pytest.raises(demo.DemoFailed, match=r"2 of 24 bits came out wrong.*make demo SEED=4"):
        demo.check([finished(3, wrong=2)], [1e-7], 1e-5, 3)
    with pytest.raises(demo.DemoFailed, match=r"differs from the whole sequence by 1.0e-02"):
        demo.check([finished(3)], [1e-2], 1e-5, 0)


def test_a_model_that_is_not_there_is_said_plainly(tmp_path, capsys):
    assert demo.main(["--no-train", "--model-dir", str(tmp_path), "--run-dir", str(tmp_path)]) == 1
    assert "There is no model under" in capsys.readouterr().out


def test_the_example_client_runs(copying_gateway):
    script = Path(demo.__file__).with_name("client.py")
    done = subprocess.run(
        [sys.executable, str(script), "--target", copying_gateway.target],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "copy version 1 takes [time, 10], gives [time, 8]" in done.stdout
    assert "now at position 10" in done.stdout


def test_the_example_client_says_what_is_wrong():
    script = Path(demo.__file__).with_name("client.py")
    done = subprocess.run(
        [sys.executable, str(script), "--target", "127.0.0.1:1", "--timeout", "0.5"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("127.0.0.1:1: UNAVAILABLE")
    assert "Traceback" not in done.stderr
