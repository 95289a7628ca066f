"""Controllers: whatever Keras object the user gives, turned into one step with explicit, flat state.

A controller is a chain of stages. A recurrent layer contributes its cell, whose state is carried by the NTM from step
to step beside the memory (nothing lives on a layer between steps); any other layer is applied to the values of the one
step. What cannot work that way is refused here, with the reason.
"""

from itertools import pairwise
from typing import NamedTuple

import keras
from keras import ops, tree

# The states of these cells have names that people know; those of any other cell are numbered.
STATE_NAMES = {keras.layers.LSTMCell: ("hidden", "carry")}


class StateComponent(NamedTuple):
    """One carried tensor, ``[batch, prod(shape)]``: what it is called and what it holds."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]


class LayerStage:
    """A layer without state: applied to each step on its own."""

    def __init__(self, layer):
        self.layer = layer
        self.components = ()

    def build(self, width):
        """Makes the weights. Returns the width of the output."""
        _check_width(self.layer, width)
        try:
            if not self.layer.built and type(self.layer).build is not keras.layers.Layer.build:
                self.layer.build((None, width))
            output, updated = _try_out(self.layer, width)
        except (ValueError, TypeError, IndexError) as error:
            raise ValueError(
                f"Controller layer {self.layer.name!r} ({type(self.layer).__name__}) cannot work on a single time step "
                f"[batch, {width}]: {error}"
            ) from error
        if updated:
            raise ValueError(
                f"The controller layer {self.layer.name!r} ({type(self.layer).__name__}) changes its variables "
                f"{updated} when it is called: such hidden state cannot be carried from step to step. Write it as an "
                "RNN cell, with state_size and call(inputs, states)."
            )
        shape = getattr(output, "shape", None)
        if shape is None or len(shape) != 2:
            raise ValueError(
                f"Controller layer {self.layer.name!r} should map [batch, {width}] to one tensor [batch, width]; it "
                f"returned {tree.map_structure(lambda part: tuple(part.shape), output)} for a batch of 1"
            )
        return shape[-1]

    def initial_state(self, batch_size):
        """Nothing to carry."""
        del batch_size
        return []

    def begin(self, batch_size, dtype):
        """Nothing to draw."""

    def end(self):
        """Nothing to let go of."""

    def __call__(self, inputs, states, training):
        """One step: ``[batch, width]`` to ``[batch, width]``, and no states."""
        return self.layer(inputs, **_training_argument(self.layer, training)), []


class DropoutStage(LayerStage):
    """A `keras.layers.Dropout`: one mask for the whole sequence (Gal and Ghahramani 2016), drawn before the loop."""

    mask = None

    def build(self, width):
        """Remembers how wide the mask is."""
        self.width = width
        return width

    def begin(self, batch_size, dtype):
        """Draws the mask."""
        ones = ops.ones((batch_size, self.width), dtype=dtype)
        self.mask = keras.random.dropout(ones, self.layer.rate, seed=self.layer.seed_generator)

    def end(self):
        """Forgets the mask: the next sequence gets its own."""
        self.mask = None

    def __call__(self, inputs, states, training):
        """One step under the mask."""
        if not training or self.layer.rate == 0:
            return inputs, []
        return inputs * ops.cast(self.mask, inputs.dtype), []


class CellStage:
    """A recurrent cell: its states, flattened, are carried by the NTM."""

    def __init__(self, cell, index):
        self.cell = cell
        sizes = tree.flatten(cell.state_size)
        if not all(isinstance(size, int) for size in sizes):
            raise ValueError(
                f"Controller cell {type(cell).__name__} has the state_size {cell.state_size}; only states of the shape "
                f"[batch, size] can be carried"
            )
        names = STATE_NAMES.get(type(cell)) or (
            ("hidden",) if len(sizes) == 1 else tuple(f"state_{position}" for position in range(len(sizes)))
        )
        self.components = tuple(
            StateComponent(f"controller/{index}/{name}", (size,), ("units",))
            for name, size in zip(names, sizes, strict=True)
        )

    def build(self, width):
        """Makes the weights. Returns the width of the output."""
        _check_width(self.cell, width)
        self.width = width
        if isinstance(self.cell, keras.layers.Layer) and not self.cell.built:
            self.cell.build((None, width))
            self.cell.built = True
        output_size = getattr(self.cell, "output_size", None)
        return tree.flatten(self.cell.state_size)[0] if output_size is None else output_size

    def initial_state(self, batch_size):
        """The cell's own, or zeros where it has none to tell."""
        own = getattr(self.cell, "get_initial_state", None)
        if own is not None:
            return tree.flatten(own(batch_size=batch_size))
        return [ops.zeros((batch_size, *component.shape)) for component in self.components]

    def begin(self, batch_size, dtype):
        """Has the cell draw its dropout masks, once for the sequence."""
        if hasattr(self.cell, "get_dropout_mask"):
            self.cell.get_dropout_mask(ops.ones((batch_size, self.width), dtype=dtype))
            self.cell.get_recurrent_dropout_mask(ops.ones((batch_size, *self.components[0].shape), dtype=dtype))

    def end(self):
        """Has the cell forget its masks."""
        if hasattr(self.cell, "get_dropout_mask"):
            self.cell.reset_dropout_mask()
            self.cell.reset_recurrent_dropout_mask()

    def __call__(self, inputs, states, training):
        """One step of the cell: the output, and the new states in a flat list."""
        structured = tree.pack_sequence_as(self.cell.state_size, states)
        structured = structured if isinstance(structured, (list, tuple)) else [structured]
        output, new_states = self.cell(inputs, list(structured), **_training_argument(self.cell, training))
        return output, tree.flatten(new_states)


class Controller:
    """A chain of stages, run one time step at a time.

    Args:
        model: a layer, model, cell, or list of them, as `NeuralTuringMachine` takes it.

    Raises:
        ValueError: it cannot run one step at a time with explicit state; the text says why.
    """

    def __init__(self, model):
        self.stages = []
        self._add(model)
        if not self.stages:
            raise ValueError("A controller should have at least one layer; received an empty list or model")
        self.components = tuple(component for stage in self.stages for component in stage.components)

    def build(self, input_width):
        """Makes all weights. Returns the width of the controller's output."""
        width = input_width
        for stage in self.stages:
            width = stage.build(width)
        return width

    def initial_state(self, batch_size):
        """A list of ``[batch, units]``, one for each of ``components``."""
        return [state for stage in self.stages for state in stage.initial_state(batch_size)]

    def begin(self, batch_size, dtype):
        """Draws what is random once for a sequence: no random number is drawn inside the time loop."""
        for stage in self.stages:
            stage.begin(batch_size, dtype)

    def end(self):
        """Forgets what `begin` drew."""
        for stage in self.stages:
            stage.end()

    def __call__(self, inputs, states, training):
        """One step: ``[batch, width]`` and the list of states, to the output and the new list."""
        values, new_states, position = inputs, [], 0
        for stage in self.stages:
            following = position + len(stage.components)
            values, stage_states = stage(values, states[position:following], training)
            new_states += stage_states
            position = following
        return values, new_states

    def _add(self, model):
        """Appends the stages of any object that we know how to run."""
        if isinstance(model, (list, tuple)):
            for part in model:
                self._add(part)
        elif isinstance(model, keras.layers.StackedRNNCells):
            self._add(model.cells)
        elif isinstance(model, keras.layers.Bidirectional) or getattr(model, "go_backwards", False):
            raise ValueError(
                f"{type(model).__name__} cannot be an NTM controller: it reads the sequence from its end, and the "
                "controller runs one step at a time from the start. Put Bidirectional around the NTM instead."
            )
        elif isinstance(model, (keras.layers.ConvLSTM1D, keras.layers.ConvLSTM2D, keras.layers.ConvLSTM3D)):
            raise ValueError(
                f"{type(model).__name__} cannot be an NTM controller: its state is an image, and only states of the "
                "shape [batch, size] can be carried"
            )
        elif isinstance(model, keras.layers.Masking):
            raise ValueError(
                "Masking cannot be part of an NTM controller: what is masked is a whole time step, memory included. "
                "Put it before the NTM."
            )
        elif isinstance(model, keras.layers.RNN):
            self._add(model.cell)
        elif isinstance(model, keras.layers.TimeDistributed):
            self._add(model.layer)
        elif _is_cell(model):
            self.stages.append(CellStage(model, sum(isinstance(stage, CellStage) for stage in self.stages)))
        elif isinstance(model, keras.layers.InputLayer):
            return
        elif isinstance(model, keras.Model) and (layers := _chain(model)) is not None:
            self._add(layers)
        elif isinstance(model, keras.layers.Dropout):
            self.stages.append(DropoutStage(model))
        elif isinstance(model, keras.layers.Layer):
            _refuse_hidden_state(model)
            self.stages.append(LayerStage(model))
        else:
            raise ValueError(
                "controller_model should be a Keras model or layer, an RNN cell, or a list of those; received "
                f"{model!r} ({type(model).__name__})"
            )


def _training_argument(layer, training):
    return {"training": training} if "training" in getattr(layer, "call_signature_parameters", ()) else {}


def _is_cell(model):
    return hasattr(model, "state_size") and callable(model)


def _chain(model):
    """The layers of a model in which each feeds only the next, or None for any other."""
    if isinstance(model, keras.Sequential):
        return list(model.layers)
    layers = getattr(model, "layers", [])
    try:
        linked = all(after.input is before.output for before, after in pairwise(layers))
        whole = bool(layers) and layers[0].output is model.inputs[0] and layers[-1].output is model.outputs[0]
    except (AttributeError, ValueError):  # Subclassed, shared or with several inputs: not a chain.
        return None
    return list(layers) if linked and whole and len(model.inputs) == len(model.outputs) == 1 else None


def _refuse_hidden_state(layer):
    """Stops layers whose call would lose, mix or update something from step to step."""
    for part in layer._flatten_layers():  # noqa: SLF001 - Keras has no public way to see layers inside any layer.
        if isinstance(part, keras.layers.RNN) or _is_cell(part):
            raise ValueError(
                f"The controller {layer.name!r} holds the recurrent layer {part.name!r} inside a model that is not a "
                "plain chain: its state cannot be carried from step to step and would be lost. Give the controller as "
                "a Sequential, a list of layers, an RNN cell or StackedRNNCells."
            )
        if isinstance(part, keras.layers.BatchNormalization):
            raise ValueError(  # noqa: TRY004 - the type is right; what it does cannot be done here.
                f"The controller holds {part.name!r}: batch normalization updates its moving averages in every call, "
                "which cannot be done inside the time loop. Use LayerNormalization."
            )
        if getattr(part, "seed_generator", None) is not None:
            raise ValueError(
                f"The controller holds {part.name!r} ({type(part).__name__}), which draws random numbers in every "
                "call; inside the time loop that is not possible on every backend. Use the dropout and "
                "recurrent_dropout arguments, or a Dropout layer in a Sequential."
            )


def _try_out(layer, width):
    """One step on zeros, which builds what is not built yet: the output, and the variables that the call changed."""
    with keras.StatelessScope() as scope:
        output = layer(ops.zeros((1, width), dtype=layer.compute_dtype), **_training_argument(layer, True))
    return output, [variable.path for variable in layer.variables if scope.get_current_value(variable) is not None]


def _check_width(layer, width):
    """Refuses a layer that was built for another width."""
    config = layer.get_build_config() if getattr(layer, "built", False) and hasattr(layer, "get_build_config") else None
    shape = (config or {}).get("input_shape")
    if shape and isinstance(shape[-1], int) and shape[-1] != width:
        raise ValueError(
            f"Controller layer {layer.name!r} was built for inputs of width {shape[-1]}, but the controller's inputs "
            f"have the width {width}. (The first layer sees the input beside the read vectors, input_dim + read_heads "
            "* m_depth: see controller_input_output_shape.)"
        )
