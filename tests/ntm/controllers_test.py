"""What may be a controller, what may not, and how the refusal reads."""

import keras
import numpy as np
import pytest

from ntm import NeuralTuringMachine, controller_input_output_shape
from ntm.controllers import Controller
from tests.ntm.support import DEPTH, INPUT_DIM, largest_difference, numpy, sequences

WIDTH = INPUT_DIM + DEPTH


def branching_lstm():
    inputs = keras.Input((None, WIDTH))
    return keras.Model(inputs, keras.layers.LSTM(4)(inputs) + keras.layers.GlobalAveragePooling1D()(inputs)[:, :4])


def two_inputs():
    left, right = keras.Input((WIDTH,)), keras.Input((WIDTH,))
    return keras.Model([left, right], left + right)


def built_for(width):
    layer = keras.layers.LSTM(4)
    layer.build((None, None, width))
    return layer


class Plain(keras.layers.Layer):
    """A layer that says nothing of its output's shape, and builds what it holds when it is called."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = keras.layers.Dense(4, "tanh")

    def call(self, inputs):
        return self.inner(inputs)


class Remembering(Plain):
    """Hides what it saw last in a variable."""

    def build(self, input_shape):
        self.inner.build(input_shape)
        self.last = self.add_weight((1, 4), "zeros", trainable=False, name="last")

    def call(self, inputs):
        output = self.inner(inputs) + self.last
        self.last.assign(keras.ops.mean(output, axis=0, keepdims=True))
        return output


class Wrapped(keras.Model):
    """A subclassed model around any layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def call(self, inputs):
        return self.layer(inputs)


def layer_with(controller, **options):
    return NeuralTuringMachine(3, 7, DEPTH, controller_model=controller, **{"project_controller": True, **options})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: "lstm", "should be a Keras model or layer, an RNN cell, or a list of those; received 'lstm'"),
        (lambda: keras.layers.Bidirectional(keras.layers.LSTM(4)), "Put Bidirectional around the NTM instead"),
        (lambda: keras.layers.LSTM(4, go_backwards=True), "reads the sequence from its end"),
        (branching_lstm, "its state cannot be carried from step to step and would be lost"),
        (lambda: [keras.layers.Dense(4), keras.layers.BatchNormalization()], "Use LayerNormalization"),
        (lambda: [keras.layers.GaussianNoise(0.1)], "draws random numbers in every call"),
        (lambda: [keras.layers.Conv1D(4, 3)], "cannot work on a single time step"),
        (lambda: built_for(WIDTH + 1), f"built for inputs of width {WIDTH + 1}, but the controller's .* width {WIDTH}"),
        (two_inputs, "cannot work on a single time step|one tensor"),
        (lambda: keras.layers.ConvLSTM1D(4, 3), "its state is an image"),
        (list, "should have at least one layer"),
        (Remembering, r"changes its variables \['.*last'\] when it is called: such hidden state cannot be carried"),
        (lambda: Wrapped(Remembering()), r"changes its variables \['.*last'\]"),
        (lambda: Wrapped(keras.layers.GRU(4)), "holds the recurrent layer 'gru.*would be lost"),
        (lambda: keras.layers.SpectralNormalization(keras.layers.Dense(4)), "hidden state cannot be carried"),
        (lambda: [keras.layers.Masking(), keras.layers.LSTM(4)], "Put it before the NTM"),
    ],
)
def test_a_controller_that_cannot_work_is_refused_with_the_reason(make, message):
    with pytest.raises(ValueError, match=message):
        layer_with(make())(sequences())


@pytest.mark.parametrize("make", [Plain, lambda: Wrapped(keras.layers.Dense(4)), lambda: Wrapped(Plain())])
def test_a_layer_or_model_of_ones_own_is_called_once_a_step(make):
    layer = layer_with(make(), return_sequences=True)
    assert layer(sequences()).shape == (3, 6, 3)
    assert len(layer.cell.controller.stages[0].layer.trainable_weights) == 2


def test_a_controller_of_the_wrong_width_is_told_both_widths_and_the_way_out():
    expected = controller_input_output_shape(INPUT_DIM, 3, DEPTH, 7, 3)[1]
    with pytest.raises(ValueError, match=f"has the width 4, but should have {expected}.*project_controller=True"):
        layer_with(keras.layers.Dense(4), project_controller=False)(sequences())


def test_states_are_named_by_the_place_of_their_cell():
    controller = Controller([keras.layers.LSTM(4), keras.layers.Dense(3), keras.layers.GRU(2)])
    assert [(part.name, part.shape) for part in controller.components] == [
        ("controller/0/hidden", (4,)), ("controller/0/carry", (4,)), ("controller/1/hidden", (2,))
    ]  # fmt: skip


def test_nested_models_are_taken_apart_to_their_cells():
    inner = keras.Sequential(
        [keras.layers.LSTM(4, return_sequences=True), keras.layers.TimeDistributed(keras.layers.Dense(3))]
    )
    inputs = keras.Input((None, WIDTH))
    chain = keras.Model(inputs, keras.layers.SimpleRNN(2)(keras.layers.Dense(5)(inputs)))
    assert [len(stage.components) for stage in Controller([inner, keras.layers.ReLU()]).stages] == [2, 0, 0]
    assert [len(stage.components) for stage in Controller(chain).stages] == [0, 1]


class Counter(keras.layers.Layer):
    """A cell of no known kind, with a nested state of its own and an initial state that is not zero."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.state_size, self.output_size = [1, [2, 1]], 1

    def get_initial_state(self, batch_size=None):
        return [
            keras.ops.full((batch_size, 1), 5.0),
            [keras.ops.zeros((batch_size, 2)), keras.ops.ones((batch_size, 1))],
        ]

    def call(self, inputs, states):
        count, (pair, one) = states
        return count, [count + 1, [pair + 2, one]]


def test_any_cell_with_nested_state_is_carried():
    layer = layer_with(Counter(), return_state=True)
    _, *states = layer(sequences(time=6))
    names = [component.name for component in layer.cell.state_layout[4:]]
    assert names == ["controller/0/state_0", "controller/0/state_1", "controller/0/state_2"]
    for state, value in zip(numpy(states[4:]), (11, 12, 1), strict=True):
        np.testing.assert_array_equal(state, value)


@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 0.5},
        {"recurrent_dropout": 0.5},
        {"parameter_noise": 0.5},
        {"controller_model": [keras.layers.Dense(6), keras.layers.Dropout(0.5)], "project_controller": True},
        {"controller_model": keras.layers.LSTMCell(6, dropout=0.5, recurrent_dropout=0.5), "project_controller": True},
    ],
    ids=["inputs", "reads", "noise", "controller layer", "controller cell"],
)
def test_noise_is_for_training_alone_and_drawn_anew_for_each_batch(options):
    layer = NeuralTuringMachine(3, 7, DEPTH, return_sequences=True, **{"controller_units": 6, **options} if "controller_model" not in options else options)  # fmt: skip  # noqa: E501
    calm = numpy(layer(sequences()))
    np.testing.assert_array_equal(numpy(layer(sequences(), training=False)), calm)
    first, second = numpy(layer(sequences(), training=True)), numpy(layer(sequences(), training=True))
    assert np.abs(first - calm).max() > 1e-6
    assert np.abs(first - second).max() > 1e-6
    np.testing.assert_array_equal(numpy(layer(sequences())), calm)


def test_dropout_uses_one_mask_for_all_steps_and_scales_what_stays():
    layer = NeuralTuringMachine(3, 7, DEPTH, dropout=0.5, recurrent_dropout=0.25, seed=3)
    noise = layer._draw_noise(keras.ops.ones((4, 6, INPUT_DIM)), True)
    assert set(np.unique(numpy(noise.inputs_mask))) == {0.0, 2.0}
    assert noise.reads_mask.shape == (4, DEPTH)
    kept = numpy(noise.reads_mask)[numpy(noise.reads_mask) > 0]
    assert 0 < kept.size < 4 * DEPTH
    np.testing.assert_allclose(kept, 1 / 0.75, rtol=1e-6)


@pytest.mark.parametrize("noisy", [{"dropout": 0.3}, {"recurrent_dropout": 0.3}, {"parameter_noise": 0.3}])
def test_noise_trains_compiled(noisy):
    model = keras.Sequential([keras.Input((None, INPUT_DIM)), NeuralTuringMachine(3, 7, DEPTH, **noisy)])
    model.compile("adam", "mse")
    assert np.isfinite(model.train_on_batch(sequences(time=3), np.zeros((3, 3), "float32")))


def test_weights_of_the_controller_are_trained():
    layer = layer_with(keras.Sequential([keras.layers.LSTM(4), keras.layers.Dense(3)]))
    before = [numpy(weight.value) for weight in (layer(sequences()), layer.trainable_weights)[1]]
    model = keras.Sequential([layer])
    model.compile(keras.optimizers.SGD(1.0), "mse", run_eagerly=True)
    model.train_on_batch(sequences(), np.ones((3, 3), "float32"))
    after = [numpy(weight.value) for weight in layer.trainable_weights]
    assert len(after) == 3 + 2 + 2 + 2 + 1
    assert all(largest_difference([new], [old]) > 0 for new, old in zip(after, before, strict=True))
