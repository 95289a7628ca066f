"""The networks that are compared: the NTM with dense or LSTM controllers, and the baselines without a memory."""

import keras

from ntm import NeuralTuringMachine
from training.config import BASELINES, ModelConfig


def build_model(
    config: ModelConfig, input_dim: int, output_dim: int, *, seed: int, slots: int | None = None, noise: object = 0.0
) -> keras.Sequential:
    """A model from sequences ``[batch, time, input_dim]`` to probabilities ``[batch, time, output_dim]``.

    Its last layer is the sigmoid; `logits_model` is the same without it.

    Args:
        config: which network.
        input_dim: values in an input step.
        output_dim: bits in an output step.
        seed: of the initial weights and the noise.
        slots: of the memory, if not the configured number. The weights fit any number of slots.
        noise: deviation of the noise on the head parameters in training: a number or a `keras.Variable`.
    """
    keras.utils.set_random_seed(seed)
    if config.kind in BASELINES:
        body = _baseline(config, output_dim)
    else:
        body = [_ntm(config, output_dim, seed, slots or config.n_slots, noise)]
    return keras.Sequential([keras.Input((None, input_dim)), *body, keras.layers.Activation("sigmoid")])


def logits_model(model: keras.Sequential) -> keras.Sequential:
    """The model without its sigmoid; it shares the layers."""
    return keras.Sequential([keras.Input(model.input_shape[1:]), *model.layers[:-1]])


def _baseline(config: ModelConfig, output_dim: int) -> list[keras.layers.Layer]:
    """Layers without a memory; the last one gives logits."""
    layers = keras.layers
    if config.kind == "dense":
        hidden = [layers.Dense(config.units, "tanh") for _ in range(config.layers)]
        return [*hidden, layers.Dense(output_dim, name="output")]
    if config.kind == "lstm-stack":
        hidden = [layers.LSTM(config.units, return_sequences=True) for _ in range(config.layers - 1)]
        return [*hidden, layers.LSTM(output_dim, activation="linear", return_sequences=True, name="output")]
    hidden = [layers.LSTM(config.units, return_sequences=True) for _ in range(config.layers)]
    return [*hidden, layers.Dense(output_dim, name="output")]


def _controller(config: ModelConfig) -> dict[str, object]:
    """The layer's options that make its controller."""
    if config.kind == "ntm-lstm":
        return {"controller_model": keras.layers.LSTMCell(config.units), "project_controller": True}
    if config.kind == "ntm-double-dense":
        twice = keras.Sequential([keras.layers.Dense(config.units, "tanh") for _ in range(2)])
        return {"controller_model": twice, "project_controller": True}
    return {"controller_units": config.units}


def _ntm(config: ModelConfig, output_dim: int, seed: int, slots: int, noise: object) -> NeuralTuringMachine:
    """The paper's form of the layer. The first weightings are not learned: they stand on slot 0."""
    layer = NeuralTuringMachine(
        output_dim,
        n_slots=slots,
        m_depth=config.m_depth,
        shift_range=config.shift_range,
        read_heads=config.heads,
        write_heads=config.heads,
        activation="linear",
        learn_weightings=False,
        return_sequences=True,
        seed=seed,
        name="ntm",
        **_controller(config),
    )
    # Set here and not given above, because a schedule passes a variable.
    layer.cell.parameter_noise = noise
    return layer
