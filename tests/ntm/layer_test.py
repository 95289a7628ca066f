"""The contract of a Keras recurrent layer, held by the NTM."""

import shutil

import keras
import numpy as np
import pytest
from keras import ops

from ntm import NeuralTuringMachine, NTMCell, controller_input_output_shape
from tests.ntm.support import (
    BACKEND,
    INPUT_DIM,
    compiled,
    controller_options,
    largest_difference,
    numpy,
    randomise,
    sequences,
    weight_gradients,
)

MASK = np.array([[0, 1, 0, 1, 1, 0], [1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]], bool)


def layer_of(kind="cell", **options):
    layer = NeuralTuringMachine(3, 7, 5, **{"return_sequences": True, **controller_options(kind), **options})
    layer.build((3, 6, INPUT_DIM))
    randomise(layer)
    return layer


def test_widths_and_parameter_count_of_the_ancestor():
    assert controller_input_output_shape(10, 8, 20, 128, 3, 1, 1) == (30, 100)
    # output_dim + R(m + s + 3) + W(3m + s + 3)
    assert controller_input_output_shape(4, 3, 5, 9, 4, 3, 2) == (4 + 3 * 5, 3 + 3 * (5 + 4 + 3) + 2 * (15 + 4 + 3))
    layer = NeuralTuringMachine(8, n_slots=128, m_depth=20)
    layer.build((None, None, 10))
    assert layer.count_params() == 3100


def test_without_return_sequences_the_last_output_comes():
    whole = numpy(layer_of()(sequences()))
    np.testing.assert_array_equal(numpy(layer_of(return_sequences=False)(sequences())), whole[:, -1])


def test_go_backwards_is_the_reversed_sequence():
    expected = numpy(layer_of()(sequences()[:, ::-1]))
    np.testing.assert_allclose(numpy(layer_of(go_backwards=True)(sequences())), expected, atol=1e-6)


@pytest.mark.parametrize("unroll", [False, True])
def test_go_backwards_with_a_mask(unroll):
    expected = numpy(layer_of()(sequences()[:, ::-1], mask=MASK[:, ::-1]))
    ours = numpy(layer_of(go_backwards=True, unroll=unroll)(sequences(), mask=MASK))
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_a_stateful_layer_goes_on_where_it_stopped_and_resets_to_the_initial_state():
    whole, stateful = numpy(layer_of()(sequences())), layer_of(stateful=True)
    stateful.reset_states()  # The first weightings are learned: the weights that they come from were just set.
    first = numpy(stateful(sequences()[:, :2]))
    second = numpy(stateful(sequences()[:, 2:]))
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), whole, atol=1e-5)
    stateful.reset_states()
    initial = numpy(stateful.get_initial_state(3))
    assert initial[0].min() > 0
    assert largest_difference([variable.value for variable in stateful.states], initial) == 0
    np.testing.assert_allclose(numpy(stateful(sequences()[:, :2])), first, atol=1e-6)


def test_a_stateful_layer_names_the_batch_that_it_expects():
    stateful = layer_of(stateful=True)
    with pytest.raises(ValueError, match="states for a batch of 3; received a batch of 2"):
        stateful(sequences()[:2])


def test_batch_size_serves_a_stateful_layer_in_a_model_that_does_not_tell_it():
    model = keras.Sequential()
    model.add(NeuralTuringMachine(3, 7, 5, stateful=True, input_shape=(None, INPUT_DIM), batch_size=3))
    first, second = numpy(model(sequences())), numpy(model(sequences()))
    assert np.abs(first - second).max() > 0


def test_masked_outputs_are_the_last_one_and_zeros_before_the_first():
    for unroll in (False, True):
        outputs = numpy(layer_of(unroll=unroll)(sequences(), mask=MASK))
        np.testing.assert_array_equal(outputs[0, 0], 0)
        np.testing.assert_array_equal(outputs[0, 2], outputs[0, 1])
        np.testing.assert_array_equal(outputs[2, :2], 0)
        np.testing.assert_array_equal(outputs[1, 4:], np.stack([outputs[1, 3]] * 2))
        assert not np.array_equal(outputs[0, 4], outputs[0, 3])


def test_zero_output_for_mask():
    outputs = numpy(layer_of(zero_output_for_mask=True)(sequences(), mask=MASK))
    np.testing.assert_array_equal(outputs[~MASK], 0)
    np.testing.assert_array_equal(outputs[MASK], numpy(layer_of()(sequences(), mask=MASK))[MASK])


def test_a_masking_layer_masks():
    layer, batch = layer_of(), sequences()
    batch[~MASK] = 9.0
    model = keras.Sequential([keras.Input((None, INPUT_DIM)), keras.layers.Masking(9.0), layer])
    np.testing.assert_allclose(numpy(model(batch)), numpy(layer(batch, mask=MASK)), atol=1e-6)


def test_symbolic_shapes_with_dynamic_batch_and_time():
    inputs = keras.Input((None, INPUT_DIM))
    assert layer_of()(inputs).shape == (None, None, 3)
    assert layer_of(return_sequences=False)(inputs).shape == (None, 3)
    outputs = layer_of(return_state=True, read_heads=2, write_heads=3)(inputs)
    assert [part.shape for part in outputs] == [
        (None, None, 3), (None, 35), (None, 10), (None, 14), (None, 21), (None, 6), (None, 6)
    ]  # fmt: skip
    model = keras.Model(inputs, outputs)
    for batch, time in ((2, 3), (5, 1)):
        assert [part.shape[0] for part in model(sequences(batch, time))] == [batch] * 7


def test_an_initial_state_may_be_an_input_of_the_model():
    layer, given = layer_of(return_state=True), numpy(layer_of(return_state=True)(sequences(seed=5)))[1:]
    states = [keras.Input((size,)) for size in layer.state_size]
    inputs, mask = keras.Input((None, INPUT_DIM)), keras.Input((None,), dtype="bool")
    model = keras.Model([inputs, mask, *states], layer(inputs, initial_state=states, mask=mask))
    expected = layer(sequences(), initial_state=given, mask=MASK)
    assert largest_difference(model([sequences(), MASK, *given]), expected) < 1e-6
    assert largest_difference(expected[1:], layer(sequences(), mask=MASK)[1:]) > 1e-3


def test_the_layout_names_every_state():
    layer = layer_of(return_state=True, read_heads=2, write_heads=3)
    layout = layer.cell.state_layout
    assert [(part.name, part.shape, part.axes) for part in layout[:4]] == [
        ("memory", (5, 7), ("depth", "slots")),
        ("read_vectors", (2, 5), ("heads", "depth")),
        ("read_weightings", (2, 7), ("heads", "slots")),
        ("write_weightings", (3, 7), ("heads", "slots")),
    ]
    assert [part.name for part in layout[4:]] == ["controller/0/hidden", "controller/0/carry"]
    _, *states = layer(sequences())
    assert [state.shape[1] for state in states] == [int(np.prod(part.shape)) for part in layout]
    memory, reads, weightings = (
        numpy(state).reshape(3, *part.shape) for state, part in zip(states[:3], layout, strict=False)
    )
    np.testing.assert_allclose(np.einsum("bds,bhs->bhd", memory, weightings), reads, atol=1e-5)


def test_the_cell_runs_in_a_keras_rnn_and_in_a_stack():
    layer = layer_of()
    np.testing.assert_allclose(numpy(keras.layers.RNN(layer.cell, return_sequences=True)(sequences())), numpy(layer(sequences())), atol=1e-6)  # fmt: skip  # noqa: E501 - one comparison
    stack = keras.layers.RNN(keras.layers.StackedRNNCells([NTMCell(4, 7, 5), keras.layers.LSTMCell(2)]))
    assert stack(sequences()).shape == (3, 2)


@pytest.mark.parametrize("merge_mode", ["concat", "sum"])
def test_bidirectional(merge_mode):
    wrapped = keras.layers.Bidirectional(NeuralTuringMachine(3, 7, 5, return_sequences=True), merge_mode=merge_mode)
    assert wrapped(sequences(), mask=MASK).shape == (3, 6, 6 if merge_mode == "concat" else 3)
    forward, backward = numpy(wrapped.forward_layer(sequences())), numpy(wrapped.backward_layer(sequences()))
    both = [forward, backward[:, ::-1]]
    expected = np.concatenate(both, axis=-1) if merge_mode == "concat" else sum(both)
    np.testing.assert_allclose(numpy(wrapped(sequences())), expected, atol=1e-6)


def test_a_stateful_bidirectional_resets_both_of_its_machines():
    wrapped = keras.layers.Bidirectional(layer_of(stateful=True))
    wrapped = keras.layers.Bidirectional.from_config(wrapped.get_config())
    first, second = numpy(wrapped(sequences())), numpy(wrapped(sequences()))
    wrapped.reset_states()
    assert largest_difference([wrapped(sequences())], [first]) == 0
    assert largest_difference([second[..., :3]], [first[..., :3]]) > 1e-6
    assert largest_difference([second[..., 3:]], [first[..., 3:]]) > 1e-6


def test_time_distributed_runs_one_machine_over_each_inner_sequence():
    layer = layer_of(return_sequences=False)
    inner = np.stack([sequences(seed=1), sequences(seed=2)], axis=1)
    outer = numpy(keras.layers.TimeDistributed(layer)(inner))
    np.testing.assert_allclose(outer[:, 1], numpy(layer(inner[:, 1])), atol=1e-6)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16", "bfloat16"])
def test_half_precision_policies_address_in_float32(policy):
    layer = layer_of("cell", return_state=True, dtype=policy)
    outputs, *states = layer(sequences(), mask=MASK)
    assert keras.backend.standardize_dtype(outputs.dtype) == layer.compute_dtype
    assert {keras.backend.standardize_dtype(state.dtype) for state in states} == {"float32"}
    symbolic = [part.dtype for part in layer(keras.Input((None, INPUT_DIM)))]
    assert symbolic == [keras.backend.standardize_dtype(part.dtype) for part in (outputs, *states)]
    full, *_ = layer_of("cell", return_state=True)(sequences(), mask=MASK)
    difference = largest_difference([ops.cast(outputs, "float32")], [full])
    assert 0 < difference < 0.15


@pytest.mark.skipif(BACKEND == "torch", reason="PyTorch compiles for minutes: the test below has a smaller case for it")
def test_compiled_and_eager_are_equal():
    layer = layer_of(return_state=True)
    found = compiled(lambda batch: layer(batch, mask=ops.convert_to_tensor(MASK)))(ops.convert_to_tensor(sequences()))
    assert largest_difference(found, layer(sequences(), mask=MASK)) < 1e-5


@pytest.mark.filterwarnings("ignore")  # What torch.compile itself warns of while it traces.
@pytest.mark.skipif(BACKEND == "torch" and not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_trains_as_one_that_is_not():
    def losses(jit_compile):
        layer = layer_of(unroll=BACKEND == "torch")
        model = keras.Sequential([keras.Input((2, INPUT_DIM)), layer])
        randomise(layer)
        model.compile(keras.optimizers.SGD(0.1), "binary_crossentropy", jit_compile=jit_compile)
        batch = sequences(2, 2)
        return [float(model.train_on_batch(batch, (batch[:, :, :3] > 0) * np.float32(1))) for _ in range(3)]

    compiled_losses, plain = losses(True), losses(False)
    np.testing.assert_allclose(compiled_losses, plain, atol=1e-5)
    assert plain[-1] < plain[0]


def test_recomputing_in_the_backward_pass_changes_no_gradient():
    layer = layer_of(read_heads=2, learn_memory=True)
    plain, recomputed = (
        weight_gradients(layer, lambda training=training: ops.sum(ops.square(layer(sequences(), training=training))))
        for training in (False, True)
    )
    assert len(plain) == len(layer.trainable_weights)
    for one, other in zip(plain, recomputed, strict=True):
        assert np.abs(one).max() > 0
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-4)


def test_the_initial_state_is_learned_where_asked():
    layer = layer_of(learn_memory=True)
    assert {weight.name for weight in layer.cell.weights} >= {"first_memory", "first_weighting_logits"}
    memory, reads, read_weightings, *_ = numpy(layer.get_initial_state(2))
    np.testing.assert_allclose(memory[0].reshape(5, 7), numpy(layer.cell.first_memory.value), rtol=1e-6)
    np.testing.assert_allclose(memory[0].reshape(5, 7) @ read_weightings[0], reads[0], rtol=1e-4)


def test_the_first_focus_is_sharp_and_the_first_memory_constant():
    memory, _, read_weightings, write_weightings = numpy(NTMCell(8, 128, 20).get_initial_state(2))
    np.testing.assert_allclose(memory, 1e-6)
    for weightings in (read_weightings, write_weightings):
        assert (weightings.argmax(-1) == 0).all()
        assert 0.9 < weightings.max() < 1


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "linear", "softmax"])
def test_any_output_activation(activation):
    outputs = numpy(layer_of(activation=activation)(sequences()))
    raw = numpy(layer_of(activation="linear")(sequences()))
    np.testing.assert_allclose(outputs, numpy(keras.activations.get(activation)(ops.convert_to_tensor(raw))), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_slots": 0}, "n_slots should be an integer of at least 1; received 0"),
        ({"read_heads": 0}, "read_heads should be an integer"),
        ({"m_depth": 2.5}, "m_depth should be an integer of at least 1; received 2.5"),
        ({"n_slots": 3, "shift_range": 4}, "shift_range should be at most n_slots; received 4 and 3"),
        ({"controller_units": 4, "controller_model": keras.layers.LSTMCell(2)}, "not both"),
        ({"dropout": 1.5}, "dropout should be in 0..1; received 1.5"),
        ({"parameter_noise": -1.0}, "parameter_noise should be 0 or more; received -1.0"),
        ({"memory_value": 0.0}, "memory_value should not be zero"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        NeuralTuringMachine(3, **options)


def test_inputs_and_states_of_the_wrong_shape_are_named():
    with pytest.raises(ValueError, match=r"Expected sequences \[batch, time, input_dim\]"):
        layer_of()(np.zeros((3, 4), "float32"))
    with pytest.raises(ValueError, match="initial_state should hold 6 tensors"):
        layer_of()(sequences(), initial_state=[np.zeros((3, 35), "float32")])
    with pytest.raises(ValueError, match=r"'memory' should have the shape \(3, 35\); received \(2, 35\)"):
        layer_of()(sequences(), initial_state=layer_of().get_initial_state(2))
    with pytest.raises(ValueError, match=r"mask should be \[batch, time\] = \(3, 6\).*received the shape \(3, 4\)"):
        layer_of()(sequences(), mask=MASK[:, :4])
