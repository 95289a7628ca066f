"""Small models of every kind that can be exported, with weights of unit scale: what they have seen shows."""

import keras
import numpy as np
from keras import layers

from ntm import NeuralTuringMachine

INPUT_DIM = 4


def _ntm(output_dim=3, **options):
    options = {"n_slots": 7, "m_depth": 5, "shift_range": 3, "return_sequences": True, **options}
    return NeuralTuringMachine(output_dim, **options)


def _chains():
    return {
        "ntm": [_ntm(controller_units=6)],
        "ntm-lstm-heads": [
            _ntm(controller_model=layers.LSTMCell(6), project_controller=True, read_heads=2, write_heads=2)
        ],
        "lstm": [layers.LSTM(5, return_sequences=True), layers.Dense(3, activation="sigmoid")],
        "gru": [layers.GRU(5, return_sequences=True, reset_after=False), layers.Dense(3)],
        "stacked": [
            layers.LSTM(5, return_sequences=True, stateful=False, unroll=False),
            layers.Dropout(0.5),
            layers.LayerNormalization(),
            layers.RNN(layers.StackedRNNCells([layers.LSTMCell(4), layers.GRUCell(3)]), return_sequences=True),
            layers.TimeDistributed(keras.Sequential([layers.Dense(6, "tanh"), layers.Dense(4)])),
            keras.Sequential([layers.SimpleRNN(4, return_sequences=True), layers.ReLU()]),
            layers.BatchNormalization(),
            layers.Dense(3),
            layers.Softmax(),
        ],
        "mixed-ntm-lstm": [layers.LSTM(5, return_sequences=True), _ntm(controller_units=6), layers.Dense(2)],
    }


KINDS = tuple(_chains())


def make(kind, seed=7):
    """A built model whose weights are drawn from ``seed``."""
    model = keras.Sequential([keras.Input((None, INPUT_DIM)), *_chains()[kind]], name=kind)
    randomize(model, seed)
    return model


def randomize(model, seed=7):
    random = np.random.default_rng(seed)
    for weight in model.trainable_weights:
        scale = 1.0 if len(weight.shape) < 2 else 2.0 / np.sqrt(weight.shape[0])
        weight.assign(random.normal(size=weight.shape) * scale)
