"""A Keras ``Sequential`` as a chain of stages: each runs one time step, its states going in and coming out."""

import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import keras
from keras import ops, tree

Tensor = Any

# The states of these cells have names that people know; those of others are numbered.
_STATE_NAMES = {keras.layers.LSTMCell: ("hidden", "carry"), keras.layers.GRUCell: ("hidden",)}
# These do to [batch, width] what they do to [batch, time, width].
_ELEMENTWISE = (
    keras.layers.Dense,
    keras.layers.Activation,
    keras.layers.ActivityRegularization,
    keras.layers.ELU,
    keras.layers.Identity,
    keras.layers.LeakyReLU,
    keras.layers.ReLU,
    keras.layers.Rescaling,
)
# These work along an axis, which has to be the last: along time they would see other steps.
_ALONG_AXIS = (
    keras.layers.BatchNormalization,
    keras.layers.LayerNormalization,
    keras.layers.RMSNormalization,
    keras.layers.Softmax,
    keras.layers.UnitNormalization,
)
# These do nothing at inference.
_IN_TRAINING_ONLY = (
    keras.layers.AlphaDropout,
    keras.layers.Dropout,
    keras.layers.GaussianDropout,
    keras.layers.GaussianNoise,
    keras.layers.InputLayer,
    keras.layers.SpatialDropout1D,
)
_OTHER_STEPS = "it looks at other time steps than the one that is made"
_WHY_NOT = (
    (keras.layers.Bidirectional, "it reads the sequence from its end, which has not come yet when a step is made"),
    (keras.layers.Embedding, "it takes token ids, and steps carry float32 vectors: look them up before the model"),
    (keras.layers.Masking, "a served sequence has no masked steps, only a length: leave the layer out"),
    (keras.layers.Attention, _OTHER_STEPS),
    (keras.layers.MultiHeadAttention, _OTHER_STEPS),
    (keras.layers.GroupQueryAttention, _OTHER_STEPS),
    (keras.layers.Conv1D, _OTHER_STEPS),
    (keras.layers.GlobalAveragePooling1D, _OTHER_STEPS),
    (keras.layers.GlobalMaxPooling1D, _OTHER_STEPS),
    (keras.layers.Lambda, "what its function does with the time axis cannot be known"),
)


class ExportError(ValueError):
    """The model cannot be exported; the text says what stands in the way."""


class Component(NamedTuple):
    """One state tensor of one row: its name, its shape, and what each axis counts."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]

    @property
    def size(self) -> int:
        """How many floats it takes in the row."""
        return math.prod(self.shape)


class Stage(Protocol):
    """A layer, one time step at a time, as at inference."""

    @property
    def components(self) -> tuple[Component, ...]:
        """What it carries from step to step."""
        ...

    def initial_state(self) -> list[Tensor]:
        """The states before the first step, for a batch of one."""
        ...

    def step(self, inputs: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """One step: ``[batch, width]`` and the states ``[batch, *shape]``, to outputs and new states."""
        ...


def stages_of(model: keras.Sequential) -> list[Stage]:
    """The stages of a model, in order.

    Args:
        model: A ``Sequential`` of recurrent layers and of layers that work on each time step by itself.

    Raises:
        ExportError: a layer cannot be run one time step at a time; the text says which and why.
    """
    if not isinstance(model, keras.Sequential):
        raise ExportError(f"expected a keras.Sequential; got {type(model).__name__} {_name(model)!r}")
    layers = flat_layers(model)
    recurrent = [layer for layer in layers if isinstance(layer, keras.layers.RNN)]
    prefixes = {id(layer): f"{layer.name}/" if len(recurrent) > 1 else "" for layer in recurrent}
    stages = [
        _stage(layer, prefixes.get(id(layer), "")) for layer in layers if not isinstance(layer, _IN_TRAINING_ONLY)
    ]
    if not any(stage.components for stage in stages):
        raise ExportError(f"model {model.name!r} has no recurrent layer: there is no state to carry between steps")
    return stages


class RecurrentStage:
    """A recurrent layer's cell."""

    def __init__(self, layer: keras.layers.RNN, prefix: str) -> None:
        _check_recurrent(layer)
        self._layer = layer
        self._cell = layer.cell
        self._structure = layer.get_initial_state(batch_size=1)
        self._dtypes = [_dtype(state) for state in tree.flatten(self._structure)]
        self.components = tuple(
            component._replace(name=prefix + component.name) for component in _components(self._cell, self._structure)
        )

    def initial_state(self) -> list[Tensor]:
        """The layer's own."""
        return list(tree.flatten(self._structure))

    def step(self, inputs: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """One call of the cell."""
        states = [ops.cast(state, dtype) for state, dtype in zip(states, self._dtypes, strict=True)]
        structured = tree.pack_sequence_as(self._structure, states)
        outputs, new_states = self._cell(inputs, structured, **_at_inference(self._cell))
        return outputs, list(tree.flatten(new_states))


class LayerStage:
    """A layer without state, on one time step by itself."""

    components = ()

    def __init__(self, layer: keras.layers.Layer, *, with_time_axis: bool) -> None:
        self._layer = layer
        self._with_time_axis = with_time_axis

    def initial_state(self) -> list[Tensor]:
        """Nothing."""
        return []

    def step(self, inputs: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """One call of the layer."""
        options = _at_inference(self._layer)
        if self._with_time_axis:
            return self._layer(inputs[:, None], **options)[:, 0], []
        return self._layer(inputs, **options), []


def flat_layers(model: keras.Sequential) -> list[keras.layers.Layer]:
    """The layers of a model in order, those of a ``Sequential`` inside it in its place."""
    layers: list[keras.layers.Layer] = []
    for layer in model.layers:
        layers += flat_layers(layer) if isinstance(layer, keras.Sequential) else [layer]
    return layers


def _stage(layer: keras.layers.Layer, prefix: str) -> Stage:
    if isinstance(layer, keras.layers.RNN):
        return RecurrentStage(layer, prefix)
    if isinstance(layer, keras.layers.TimeDistributed):
        return LayerStage(layer.layer, with_time_axis=False)
    # A subclass may do anything: it has to say by TimeDistributed that it looks at one step alone.
    if type(layer) in _ELEMENTWISE:
        return LayerStage(layer, with_time_axis=False)
    if type(layer) in _ALONG_AXIS:
        if layer.axis not in (-1, 2, [-1], [2]):
            raise _refusal(layer, f"it works along axis {layer.axis}; only the last, -1, leaves the time steps apart")
        return LayerStage(layer, with_time_axis=True)
    why = next((why for kind, why in _WHY_NOT if isinstance(layer, kind)), None)
    raise _refusal(
        layer, why or "it may look at other time steps; if it does not, wrap it in keras.layers.TimeDistributed"
    )


def _check_recurrent(layer: keras.layers.RNN) -> None:
    if layer.go_backwards:
        raise _refusal(layer, "go_backwards reads the sequence from its end, which has not come when a step is made")
    if not layer.return_sequences:
        raise _refusal(layer, "it returns its last output only; a step answers every time step: return_sequences=True")
    if layer.return_state:
        raise _refusal(layer, "it returns its state beside its outputs; the export carries it already")
    if isinstance(layer, keras.layers.ConvLSTM1D | keras.layers.ConvLSTM2D | keras.layers.ConvLSTM3D):
        raise _refusal(layer, "its time steps are images; steps carry vectors [time, input_dim]")


def _components(cell: Any, structure: Any) -> list[Component]:
    """What the cell says of its states, or else what can be known from them."""
    states = tree.flatten(structure)
    layout = getattr(cell, "state_layout", None)
    if layout is not None:
        components = [Component(part.name, tuple(part.shape), tuple(part.axes)) for part in layout]
    elif isinstance(cell, keras.layers.StackedRNNCells):
        components = [
            part._replace(name=f"{index}/{part.name}")
            for index, (inner, inner_structure) in enumerate(zip(cell.cells, structure, strict=True))
            for part in _components(inner, inner_structure)
        ]
    else:
        names = _STATE_NAMES.get(type(cell)) or [f"state_{number}" for number in range(len(states))]
        names = ["hidden"] if len(states) == 1 else names
        components = [
            Component(name, tuple(state.shape[1:]), ("units",) if len(state.shape) == 2 else ())
            for name, state in zip(names, states, strict=True)
        ]
    _check_components(cell, components, states)
    return components


def _check_components(cell: Any, components: Sequence[Component], states: Sequence[Tensor]) -> None:
    told = [component.size for component in components]
    found = [math.prod(state.shape[1:]) for state in states]
    if told != found:
        raise ExportError(f"{type(cell).__name__}.state_layout tells of sizes {told}; its states have {found}")
    wide = [component.name for component, state in zip(components, states, strict=True) if _dtype(state) not in _FIT]
    if wide:
        raise ExportError(f"states {wide} do not fit into float32 without loss: expected one of {sorted(_FIT)}")


# Dtypes whose every value a float32 holds.
_FIT = {"float32", "float16", "bfloat16"}


def _dtype(tensor: Tensor) -> str:
    return str(keras.backend.standardize_dtype(tensor.dtype))


def _refusal(layer: keras.layers.Layer, why: str) -> ExportError:
    return ExportError(f"layer {layer.name!r} ({type(layer).__name__}) cannot be stepped: {why}")


def _at_inference(layer: Any) -> dict[str, bool]:
    call = layer.call if isinstance(layer, keras.layers.Layer) else layer
    return {"training": False} if "training" in inspect.signature(call).parameters else {}


def _name(model: object) -> str:
    return str(getattr(model, "name", model))
