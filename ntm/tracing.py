"""Looking in: what every head did at every step, as named arrays, and the figure that the paper draws from them."""

from dataclasses import dataclass

import keras
import numpy as np
from keras import ops

from ntm import parameters
from ntm.layer import NeuralTuringMachine


@dataclass(frozen=True)
class HeadTrace:
    """What the heads of one kind were told, and where they looked. All NumPy, batch and time in front.

    Attributes:
        weightings: ``[batch, time, heads, slots]``.
        keys: ``[batch, time, heads, depth]``, the paper's k.
        strengths: ``[batch, time, heads]``, beta.
        gates: ``[batch, time, heads]``, g.
        shifts: ``[batch, time, heads, shifts]``, s; `ntm.addressing.shift_offsets` names the last axis.
        gammas: ``[batch, time, heads]``.
    """

    weightings: np.ndarray
    keys: np.ndarray
    strengths: np.ndarray
    gates: np.ndarray
    shifts: np.ndarray
    gammas: np.ndarray


@dataclass(frozen=True)
class Trace:
    """A sequence as the machine went through it. All NumPy, batch and time in front.

    Attributes:
        inputs: ``[batch, time, input_dim]``, of the NTM layer.
        outputs: ``[batch, time, output_dim]``, of the NTM layer.
        memory: ``[batch, time, slots, depth]``, after the step.
        read_vectors: ``[batch, time, read_heads, depth]``.
        erases: ``[batch, time, write_heads, depth]``, the paper's e.
        adds: ``[batch, time, write_heads, depth]``, a.
        read: the read heads.
        write: the write heads.
    """

    inputs: np.ndarray
    outputs: np.ndarray
    memory: np.ndarray
    read_vectors: np.ndarray
    erases: np.ndarray
    adds: np.ndarray
    read: HeadTrace
    write: HeadTrace


def trace(model, inputs):
    """Steps an NTM through sequences and writes down what its heads do. For looking: it runs step by step, slowly.

    Args:
        model: a built `NeuralTuringMachine`, or a model with exactly one in it (not inside a wrapper or inner model).
        inputs: what the model takes; for the layer itself ``[batch, time, input_dim]``. There is no masking: give
            sequences of one length.

    Returns:
        A `Trace`.

    Raises:
        ValueError: there is no such layer in the model, or several.
    """
    layer, sequences = _find(model, inputs)
    if layer.go_backwards:
        sequences = sequences[:, ::-1]
    cell = layer.cell
    states = cell.unflatten(cell.get_initial_state(sequences.shape[0]))
    steps = []
    for time in range(sequences.shape[1]):
        step_inputs = ops.convert_to_tensor(sequences[:, time])
        raw = cell.consult(step_inputs, states)[1]
        output, states = cell.step(step_inputs, states)
        steps.append(_record(cell, output, states, parameters.split(raw, cell.head_parameters)))
    columns = {name: np.stack([step[name] for step in steps], axis=1) for name in steps[0]}
    return _assemble(sequences, columns, cell.read_heads)


def _find(model, inputs):
    """The NTM layer and its own input sequences."""
    if isinstance(model, NeuralTuringMachine):
        return model, _to_numpy(inputs)
    found = [layer for layer in getattr(model, "layers", ()) if isinstance(layer, NeuralTuringMachine)]
    if len(found) != 1:
        raise ValueError(f"Expected a model with one NeuralTuringMachine among its layers; found {len(found)}")
    before = keras.Model(model.inputs, found[0].input)
    return found[0], _to_numpy(before(ops.convert_to_tensor(inputs)))


def _record(cell, output, states, said):
    """One step as NumPy arrays by name."""
    memory, read_vectors, read_weightings, write_weightings = (_to_numpy(state) for state in states[:4])
    return {
        "outputs": _to_numpy(output),
        "memory": memory.transpose(0, 2, 1),
        "read_vectors": read_vectors,
        "weightings": np.concatenate([read_weightings, write_weightings], axis=1),
        **{name: _to_numpy(value) for name, value in said.items()},
    }


def _assemble(sequences, columns, read_heads):
    def heads(part):
        return HeadTrace(
            weightings=columns["weightings"][:, :, part],
            keys=columns["key"][:, :, part],
            strengths=columns["strength"][:, :, part, 0],
            gates=columns["gate"][:, :, part, 0],
            shifts=columns["shifts"][:, :, part],
            gammas=columns["gamma"][:, :, part, 0],
        )

    return Trace(
        inputs=sequences,
        outputs=columns["outputs"],
        memory=columns["memory"],
        read_vectors=columns["read_vectors"],
        erases=columns["erase"],
        adds=columns["add"],
        read=heads(slice(None, read_heads)),
        write=heads(slice(read_heads, None)),
    )


def _to_numpy(value):
    """A float64 policy stays float64; float16 and bfloat16, which plots cannot take, become float32."""
    array = ops.convert_to_numpy(value)
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)
