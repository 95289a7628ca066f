import io

import keras
import numpy as np
import pytest

import ntm
from ntm import NeuralTuringMachine
from tests.ntm.support import INPUT_DIM, numpy, randomise, sequences


def machine(**options):
    layer = NeuralTuringMachine(3, 7, 5, read_heads=2, controller_units=6, return_sequences=True, **options)
    layer.build((None, None, INPUT_DIM))
    randomise(layer)
    return layer


def test_a_trace_tells_what_the_layer_did():
    layer = machine(return_state=True)
    outputs, memory, reads, read_weightings, write_weightings = numpy(layer(sequences()))
    trace = ntm.trace(layer, sequences())
    np.testing.assert_allclose(trace.outputs, outputs, atol=1e-6)
    np.testing.assert_allclose(trace.memory[:, -1].transpose(0, 2, 1).reshape(3, -1), memory, atol=1e-6)
    np.testing.assert_allclose(trace.read_vectors[:, -1].reshape(3, -1), reads, atol=1e-6)
    np.testing.assert_allclose(trace.read.weightings[:, -1].reshape(3, -1), read_weightings, atol=1e-6)
    np.testing.assert_allclose(trace.write.weightings[:, -1].reshape(3, -1), write_weightings, atol=1e-6)
    np.testing.assert_allclose(
        np.einsum("bthn,btnd->bthd", trace.read.weightings, trace.memory), trace.read_vectors, atol=1e-5
    )


def test_shapes_and_ranges_of_everything_in_a_trace():
    trace = ntm.trace(machine(), sequences())
    for heads, count in ((trace.read, 2), (trace.write, 1)):
        assert heads.weightings.shape == (3, 6, count, 7)
        assert heads.keys.shape == (3, 6, count, 5)
        assert heads.shifts.shape == (3, 6, count, 3)
        assert heads.strengths.shape == heads.gates.shape == heads.gammas.shape == (3, 6, count)
        np.testing.assert_allclose(heads.weightings.sum(-1), 1, atol=1e-5)
        np.testing.assert_allclose(heads.shifts.sum(-1), 1, atol=1e-5)
        assert heads.strengths.min() >= 0
        assert heads.gammas.min() >= 1
        assert 0 <= heads.gates.min() <= heads.gates.max() <= 1
    assert trace.memory.shape == (3, 6, 7, 5)
    assert trace.erases.shape == trace.adds.shape == (3, 6, 1, 5)


def test_a_write_of_the_trace_is_the_change_of_the_memory():
    trace = ntm.trace(machine(), sequences())
    focus, before = trace.write.weightings[:, 1:, 0, :, None], trace.memory[:, :-1]
    written = before * (1 - focus * trace.erases[:, 1:, 0, None, :]) + focus * trace.adds[:, 1:, 0, None, :]
    np.testing.assert_allclose(written, trace.memory[:, 1:], atol=1e-5)


def test_the_machine_is_found_inside_a_model_and_gets_its_own_inputs():
    layer = machine()
    model = keras.Sequential([keras.Input((None, 2)), keras.layers.Dense(INPUT_DIM), layer, keras.layers.Dense(1)])
    batch = sequences(dim=2)
    trace = ntm.trace(model, batch)
    np.testing.assert_allclose(trace.inputs, numpy(model.layers[0](batch)), atol=1e-6)
    np.testing.assert_allclose(trace.outputs, numpy(layer(trace.inputs)), atol=1e-6)


def test_go_backwards_is_traced_as_it_runs():
    layer = machine(go_backwards=True)
    np.testing.assert_allclose(ntm.trace(layer, sequences()).outputs, numpy(layer(sequences())), atol=1e-6)


def test_a_model_without_a_machine_is_refused():
    with pytest.raises(ValueError, match="one NeuralTuringMachine among its layers; found 0"):
        ntm.trace(keras.Sequential([keras.Input((None, 2)), keras.layers.LSTM(2)]), sequences(dim=2))


def test_the_figure_shows_what_the_trace_holds():
    trace = ntm.trace(machine(), sequences())
    figure = ntm.plot_trace(trace, index=1, head=0)
    shown = {axes.get_title(): np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.get_title()}
    assert set(shown) == {"Inputs", "Outputs", "Adds", "Reads", "Write weightings", "Read weightings"}
    np.testing.assert_array_equal(shown["Write weightings"], trace.write.weightings[1, :, 0].T)
    np.testing.assert_array_equal(shown["Reads"], trace.read_vectors[1, :, 0].T)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    assert picture.getvalue().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"index should be in 0\.\.2; received 3"):
        ntm.plot_trace(trace, index=3)
    with pytest.raises(ValueError, match=r"head should be in 0\.\.0; received 1"):
        ntm.plot_trace(trace, head=1)
