"""A layer that was written down comes back whole: config, .keras, weights file, clone, SavedModel."""

import keras
import numpy as np
import pytest

from ntm import NeuralTuringMachine, NTMCell
from tests.ntm.support import BACKEND, CONTROLLERS, INPUT_DIM, controller_options, numpy, randomise, sequences


def model_of(kind, **options):
    layer = NeuralTuringMachine(3, 7, 5, return_sequences=True, **controller_options(kind), **options)
    model = keras.Sequential([keras.Input((None, INPUT_DIM)), layer])
    randomise(model)
    return model


@pytest.mark.parametrize("kind", CONTROLLERS)
def test_keras_file_weights_file_and_clone_give_bitwise_the_same_outputs(kind, tmp_path):
    model, batch = model_of(kind), sequences()
    expected = numpy(model(batch))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", safe_mode=True)
    np.testing.assert_array_equal(numpy(loaded(batch)), expected)
    model.save_weights(tmp_path / "model.weights.h5")
    fresh = keras.Sequential.from_config(model.get_config())
    fresh.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(numpy(fresh(batch)), expected)
    clone = keras.models.clone_model(model)
    assert not np.array_equal(numpy(clone(batch)), expected)
    clone.set_weights(model.get_weights())
    np.testing.assert_array_equal(numpy(clone(batch)), expected)


def test_every_option_survives_get_config():
    layer = NeuralTuringMachine(
        3,
        9,
        4,
        5,
        read_heads=2,
        write_heads=3,
        activation="tanh",
        controller_units=11,
        memory_value=0.5,
        learn_memory=True,
        learn_weightings=False,
        parameter_clip=None,
        parameter_noise=0.1,
        dropout=0.2,
        recurrent_dropout=0.3,
        seed=4,
        return_sequences=True,
        return_state=True,
        go_backwards=True,
        stateful=True,
        unroll=True,
        zero_output_for_mask=True,
        batch_size=6,
        name="machine",
        dtype="float64",
    )
    again = NeuralTuringMachine.from_config(layer.get_config())
    assert again.get_config() == layer.get_config()
    assert NTMCell.from_config(layer.cell.get_config()).get_config() == layer.cell.get_config()
    assert again.cell.project_controller
    assert again.cell.activation is keras.activations.tanh


def test_from_config_leaves_the_config_as_it_was():
    config = NeuralTuringMachine(
        3, 7, 5, controller_model=keras.layers.LSTMCell(4), project_controller=True
    ).get_config()
    before = repr(config)
    NeuralTuringMachine.from_config(config)
    assert repr(config) == before


def test_a_trained_model_keeps_its_optimizer_through_a_keras_file(tmp_path):
    model, batch = model_of("cell"), sequences()
    model.compile(keras.optimizers.Adam(1e-2), "mse", run_eagerly=True)
    target = np.zeros((3, 6, 3), "float32")
    model.fit(batch, target, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert int(numpy(loaded.optimizer.iterations)) == 1
    np.testing.assert_allclose(loaded.train_on_batch(batch, target), model.train_on_batch(batch, target), rtol=1e-6)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only the TensorFlow backend writes a SavedModel")
def test_a_saved_model_gives_the_same_outputs(tmp_path):
    import tensorflow as tf

    model, batch = model_of("stacked"), sequences()
    model.export(tmp_path / "saved", verbose=False)
    served = tf.saved_model.load(tmp_path / "saved")
    np.testing.assert_allclose(numpy(served.serve(batch)), numpy(model(batch)), atol=1e-6)
