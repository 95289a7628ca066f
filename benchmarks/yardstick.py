"""Builds, checks and runs the C++ yardstick: ``python benchmarks/yardstick.py``.

It is the step of the Keras layer (128 slots x 20, one read and one write head, LSTM controller of 100), against which
it is checked before it is timed.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

import numpy as np

SOURCE = Path(__file__).with_name("yardstick.cc")
# -ffast-math lets g++ vectorise exp and log, which makes it three times as fast: a yardstick should not be slow.
FLAGS = ("-std=c++20", "-O3", "-march=native", "-ffast-math", "-pthread")
SLOTS, DEPTH, UNITS, INPUT_DIM, OUTPUT_DIM = 128, 20, 100, 10, 8


def build(folder: Path) -> Path:
    """The program, compiled into ``folder``."""
    program = folder / "yardstick"
    subprocess.run(["g++", *FLAGS, str(SOURCE), "-o", str(program)], check=True)
    return program


def measure(program: Path, *, batch: int, steps: int, seconds: float, threads: int = 2) -> float:
    """Time steps a second."""
    command = [str(program), str(batch), str(steps), str(seconds), str(threads)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def model():
    """The Keras model of the same step."""
    import keras

    from ntm import NeuralTuringMachine

    layer = NeuralTuringMachine(
        OUTPUT_DIM,
        n_slots=SLOTS,
        m_depth=DEPTH,
        shift_range=3,
        controller_model=keras.layers.LSTMCell(UNITS),
        project_controller=True,
        return_sequences=True,
    )
    return keras.Sequential([keras.Input((None, INPUT_DIM)), layer])


def check(program: Path, folder: Path) -> float:
    """The largest difference between the program's outputs and the layer's, from the same weights and inputs."""
    keras_model = model()
    rng = np.random.default_rng(0)
    for weight in keras_model.weights:
        weight.assign(rng.normal(size=weight.shape, scale=0.5))
    cell = keras_model.layers[0].cell
    first = np.concatenate([np.asarray(part).reshape(1, -1) for part in cell.get_initial_state(batch_size=1)], axis=1)
    batch, steps = 4, 12
    inputs = rng.normal(size=(batch, steps, INPUT_DIM)).astype(np.float32)
    path = folder / "case"
    with path.open("wb") as file:
        for array in (*_weights(cell), inputs, np.repeat(first, batch, axis=0)):
            file.write(np.ascontiguousarray(array, np.float32).tobytes())
    subprocess.run([str(program), str(batch), str(steps), "0", "1", str(path)], check=True)
    outputs = np.fromfile(f"{path}.out", np.float32)[: batch * steps * OUTPUT_DIM].reshape(batch, steps, OUTPUT_DIM)
    return float(np.abs(outputs - np.asarray(keras_model(inputs))).max())


def _weights(cell):
    """In the order of the program's ``Weights``; the head parameters of one head side by side."""
    kernels = [np.asarray(weight) for weight in cell.weights if weight.shape[-1] == 4 * UNITS]
    projection, bias = (np.asarray(weight) for weight in cell.parameter_projection.weights)
    output, output_bias = (np.asarray(weight) for weight in cell.output_projection.weights)
    columns, start = {}, 0
    for row in cell.head_parameters:
        columns[row.name] = np.arange(start, start + row.width).reshape(row.heads, row.size)
        start += row.width
    addressing = ("key", "strength", "gate", "shifts", "gamma")
    order = np.concatenate(
        [columns[name][head] for head in (0, 1) for name in addressing] + [columns["erase"][0], columns["add"][0]]
    )
    return (*kernels, projection[:, order], bias[order], output, output_bias)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each measurement")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program = build(folder)
        difference = check(program, folder)
        print(f"largest difference from the Keras layer: {difference:.1e}")
        if difference > 1e-4:
            raise SystemExit("the yardstick does not compute the layer's step")
        for threads in (1, 2):
            for batch in (1, 8, 64):
                speed = measure(program, batch=batch, steps=16, seconds=options.seconds, threads=threads)
                print(f"{threads} threads, batch {batch:3}, 16 steps a call: {speed:9,.0f} steps/s")


if __name__ == "__main__":
    main()
