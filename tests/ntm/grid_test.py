"""Controllers x heads x masking, stepped and unrolled, batched and single: all the same numbers, on every backend."""

import numpy as np
import pytest
from keras import ops

from ntm import NeuralTuringMachine
from tests.ntm.support import (
    CONTROLLERS,
    DEPTH,
    INPUT_DIM,
    OUTPUT_DIM,
    SLOTS,
    controller_options,
    largest_difference,
    numpy,
    randomise,
    sequences,
)

TIME = 4
MASKS = {
    "none": [[1, 1, 1, 1]] * 2,
    "left": [[0, 0, 1, 1], [0, 1, 1, 1]],
    "right": [[1, 1, 0, 0], [1, 1, 1, 0]],
    "ragged": [[1, 0, 1, 1], [0, 1, 0, 1]],
}


def grid_layer(kind, read_heads, write_heads, **options):
    layer = NeuralTuringMachine(
        OUTPUT_DIM,
        n_slots=SLOTS,
        m_depth=DEPTH,
        read_heads=read_heads,
        write_heads=write_heads,
        return_sequences=True,
        return_state=True,
        **controller_options(kind, read_heads),
        **options,
    )
    layer.build((None, TIME, INPUT_DIM))
    randomise(layer)
    return layer


def step_by_hand(cell, sequence, mask):
    """One sequence through the cell, leaving masked steps out altogether: what a mask has to amount to."""
    states, output, outputs = cell.get_initial_state(1), np.zeros((1, OUTPUT_DIM), "float32"), []
    for inputs, valid in zip(sequence, mask, strict=True):
        if valid:
            output, states = cell(ops.convert_to_tensor(inputs[None]), states)
        outputs.append(numpy(output))
    return [np.stack(outputs, axis=1), *numpy(states)]


@pytest.mark.parametrize(("read_heads", "write_heads"), [(1, 1), (2, 1), (3, 2)])
@pytest.mark.parametrize("kind", CONTROLLERS)
def test_every_way_through_a_sequence_gives_the_same_outputs_and_states(kind, read_heads, write_heads):
    layer, batch = grid_layer(kind, read_heads, write_heads), sequences(batch=2, time=TIME)
    unrolled = grid_layer(kind, read_heads, write_heads, unroll=True)
    for name, mask in MASKS.items():
        given = None if name == "none" else np.array(mask, bool)
        whole = numpy(layer(batch, mask=given))
        rows = [step_by_hand(layer.cell, sequence, valid) for sequence, valid in zip(batch, mask, strict=True)]
        stepped = [np.concatenate(parts) for parts in zip(*rows, strict=True)]
        single = numpy(layer(batch[1:2], mask=None if given is None else given[1:2]))
        assert largest_difference(whole, stepped) < 1e-5, name
        assert largest_difference(whole, unrolled(batch, mask=given)) < 1e-5, name
        assert largest_difference([part[1:2] for part in whole], single) < 1e-5, name
    # A control: the state matters, so agreement on it says something.
    swapped = [np.roll(state, 1, axis=0) for state in whole[1:]]
    assert largest_difference(layer(batch, initial_state=swapped)[:1], layer(batch, initial_state=whole[1:])[:1]) > 1e-3


@pytest.mark.parametrize("kind", CONTROLLERS)
def test_chunks_that_hand_their_state_on_give_the_whole(kind):
    layer, batch = grid_layer(kind, 2, 1), sequences(time=TIME)
    whole = numpy(layer(batch))
    states, outputs = None, []
    for start, end in ((0, 1), (1, 4)):
        output, *states = layer(batch[:, start:end], initial_state=states)
        outputs.append(numpy(output))
    assert largest_difference(whole, [np.concatenate(outputs, axis=1), *states]) < 1e-5
