"""`NeuralTuringMachine`: the recurrent layer around `NTMCell`.

Two forms, by the options given:

* **The ancestor's form** (the default; ntm_keras, 2017): the controller says everything itself. Its output is the
  step's output, before ``activation``, followed by the head parameters; `controller_input_output_shape` gives the
  widths. ``controller_model=None`` is a single dense layer.
* **The paper's form**: ``controller_units=100`` makes a hidden tanh layer of 100 units, or ``controller_model=...,
  project_controller=True`` takes any controller of any width, ``keras.layers.LSTMCell(100)`` say. The head parameters
  are a linear projection of the controller's output; the step's output is a projection of the controller's output
  beside the vectors just read; the first weightings are learned, starting from a sharp focus on slot 0.
"""

import contextlib
from typing import NamedTuple

import keras
from keras import ops

from ntm.cell import NTMCell, StepNoise

_CELL_OPTIONS = (
    "output_dim",
    "n_slots",
    "m_depth",
    "shift_range",
    "controller_model",
    "read_heads",
    "write_heads",
    "activation",
    "controller_units",
    "project_controller",
    "memory_value",
    "learn_memory",
    "learn_weightings",
    "parameter_clip",
    "parameter_noise",
    "dropout",
    "recurrent_dropout",
    "seed",
)


@keras.saving.register_keras_serializable(package="ntm")
class NeuralTuringMachine(keras.layers.RNN):
    """A Neural Turing Machine: a controller, and a memory that its heads read and write (arXiv 1410.5401).

    Args:
        output_dim: values in one output step.
        n_slots: slots of the memory, the paper's N.
        m_depth: values in a slot, the paper's M.
        shift_range: how many neighbouring shifts a head chooses from; `ntm.addressing.shift_offsets` gives them.
        controller_model: any Keras layer or model, RNN cell, ``StackedRNNCells``, or a ``Sequential`` or list of
            recurrent and other layers; None is one dense layer. Recurrent state inside it is carried from step to step.
        read_heads: at least 1.
        write_heads: at least 1.
        activation: of the output, any Keras activation.
        controller_units: the paper's form with a hidden tanh layer of this width. Instead of ``controller_model``.
        project_controller: True: the layer itself projects the controller's output to head parameters and output (the
            paper's form). False: the controller says them. None: True with ``controller_units``, else False.
        memory_value: what every place of the memory holds at first (Collier and Beel 2018, arXiv 1807.08518).
        learn_memory: the first memory is a weight, initialised to ``memory_value``.
        learn_weightings: the first weightings are weights. None: as ``project_controller``.
        parameter_clip: raw head parameters are clipped to plus and minus this; None turns it off.
        parameter_noise: standard deviation of the Gaussian noise on the raw head parameters in training.
        dropout: the share of inputs dropped in training; one mask for all steps (Gal and Ghahramani 2016, arXiv
            1512.05287).
        recurrent_dropout: the same for the vectors read in the step before, on their way into the controller. Memory
            and weightings are never dropped: that would forget what was stored, and weightings would not sum to one.
        seed: of dropout and noise.
        return_sequences, return_state, go_backwards, stateful, unroll, zero_output_for_mask: as in `keras.layers.RNN`.
        batch_size: the number of sequences in a batch; needed for ``stateful`` where the input does not tell it.
        input_shape: ``(time, input_dim)``, for a ``Sequential`` without a ``keras.Input``.

    Call arguments:
        sequences: ``[batch, time, input_dim]``.
        initial_state: a list of states as ``get_initial_state(batch_size)`` gives it and ``return_state`` returns it.
        mask: boolean ``[batch, time]``. A step whose entry is False leaves every state as it was; its output is the
            last one (zeros before the first, or everywhere with ``zero_output_for_mask``).
        training: turns dropout and noise on.

    Output: ``[batch, time, output_dim]`` with ``return_sequences``, else ``[batch, output_dim]``; with
    ``return_state`` followed by the states of ``cell.state_layout``, each ``[batch, size]``.
    """

    def __init__(
        self,
        output_dim,
        n_slots=50,
        m_depth=20,
        shift_range=3,
        controller_model=None,
        read_heads=1,
        write_heads=1,
        activation="sigmoid",
        *,
        controller_units=None,
        project_controller=None,
        memory_value=1e-6,
        learn_memory=False,
        learn_weightings=None,
        parameter_clip=20.0,
        parameter_noise=0.0,
        dropout=0.0,
        recurrent_dropout=0.0,
        seed=None,
        batch_size=None,
        input_shape=None,
        dtype=None,
        **kwargs,
    ):
        given = locals()
        cell = NTMCell(**{name: given[name] for name in _CELL_OPTIONS}, dtype=dtype, name="cell")
        super().__init__(cell, dtype=dtype, autocast=False, **kwargs)
        self.batch_size = batch_size
        if input_shape is not None:
            # What Keras itself keeps of this argument. Passing it on would warn against a documented use.
            self._input_shape_arg = input_shape

    def build(self, sequences_shape, initial_state_shape=None):
        """Makes the weights, and the state variables of a stateful layer."""
        super().build((sequences_shape[0] or self.batch_size, *sequences_shape[1:]), initial_state_shape)

    def call(self, sequences, initial_state=None, mask=None, training=False):
        """Runs the cell over time."""
        self._check_sequences(sequences, mask)
        batch_size = ops.shape(sequences)[0]
        if initial_state is None:
            initial_state = self.states if self.stateful else self.get_initial_state(batch_size)
        self._check_states(initial_state, sequences.shape[0])
        states = [ops.cast(ops.convert_to_tensor(state), self.cell.state_dtype) for state in initial_state]
        last_output, outputs, states = self.inner_loop(sequences, states, mask, training)
        if self.stateful:
            for variable, state in zip(self.states, states, strict=True):
                variable.assign(ops.cast(state, variable.dtype))
        output = outputs if self.return_sequences else last_output
        return (output, *states) if self.return_state else output

    def compute_output_spec(self, sequences, initial_state=None, mask=None, training=False):
        """Shapes and dtypes of a symbolic call: under a half precision policy the states are wider than the output."""
        del initial_state, mask, training
        shapes = self.compute_output_shape(sequences.shape)
        if not self.return_state:
            return keras.KerasTensor(shapes, self.compute_dtype)
        output, *states = shapes
        dtypes = (self.compute_dtype, *[self.cell.state_dtype] * len(states))
        return tuple(keras.KerasTensor(*spec) for spec in zip((output, *states), dtypes, strict=True))

    def inner_loop(self, sequences, initial_state, mask, training=False):
        """The time loop of the backend, with the mask applied in the step, in one way for all backends.

        Keras's own masking gives a masked step different outputs on different backends. Here a masked step keeps every
        state, and the last output is carried for it.
        """
        step = _Step(self.cell, sequences.shape[-1], self._draw_noise(sequences, training), mask, training)
        columns = step.columns(sequences, mask, self._draw_parameter_noise(sequences, training))
        states = step.begin(initial_state, ops.shape(sequences)[0])
        loop = _Loop(step, self.return_sequences, self.go_backwards, self.unroll)
        try:
            with _weights_read_once(self.cell):
                last_output, outputs, states = keras.layers.RNN.inner_loop(loop, columns, states, None, training)
        finally:
            self.cell.controller.end()
        if self.zero_output_for_mask and mask is not None and self.return_sequences:
            ordered = ops.flip(mask, axis=1) if self.go_backwards else mask
            outputs = outputs * ops.cast(ordered, outputs.dtype)[:, :, None]
        return last_output, outputs, self.cell.flatten(list(states)[: len(initial_state)])

    def _draw_noise(self, sequences, training):
        """The dropout masks of one sequence, and those of the controller's cells, drawn before the time loop."""
        cell, batch_size = self.cell, ops.shape(sequences)[0]
        if not training:
            return StepNoise()
        cell.controller.begin(batch_size, self.compute_dtype)

        def mask(width, rate):
            ones = ops.ones((batch_size, width), dtype=self.compute_dtype)
            return keras.random.dropout(ones, rate, seed=cell.seed_generator) if rate else None

        reads = cell.read_heads * cell.m_depth
        return StepNoise(mask(sequences.shape[-1], cell.dropout), mask(reads, cell.recurrent_dropout))

    def _draw_parameter_noise(self, sequences, training):
        """Noise for the head parameters of every step, ``[batch, time, width]``, or None."""
        cell = self.cell
        # A schedule may hold the deviation in a variable, which has no truth value inside a graph.
        if not training or (isinstance(cell.parameter_noise, (int, float)) and not cell.parameter_noise):
            return None
        shape = (*ops.shape(sequences)[:2], cell.parameters_width)
        return keras.random.normal(shape, stddev=cell.parameter_noise, dtype=cell.state_dtype, seed=cell.seed_generator)

    def _check_sequences(self, sequences, mask):
        """Names what is wrong before the backend does it in its own words."""
        if len(sequences.shape) != 3:
            raise ValueError(f"Expected sequences [batch, time, input_dim]; received the shape {sequences.shape}")
        if mask is not None and not _agree(mask.shape, sequences.shape[:2]):
            raise ValueError(
                f"mask should be [batch, time] = {tuple(sequences.shape[:2])}, as the sequences are; received the "
                f"shape {tuple(mask.shape)}"
            )
        if self.unroll and sequences.shape[1] is None:
            raise ValueError("unroll=True needs a known number of time steps; received sequences of unknown length")
        expected = self.states[0].shape[0] if self.stateful and self.states is not None else None
        if expected is not None and sequences.shape[0] not in (None, expected):
            raise ValueError(
                f"This layer is stateful, with states for a batch of {expected}; received a batch of "
                f"{sequences.shape[0]}"
            )

    def _check_states(self, states, batch_size):
        """Names the state that does not fit."""
        layout = self.cell.state_layout
        if len(states) != len(layout):
            raise ValueError(
                f"initial_state should hold {len(layout)} tensors (see cell.state_layout); received {len(states)}"
            )
        for component, size, state in zip(layout, self.state_size, states, strict=True):
            if not _agree(state.shape, (batch_size, size)):
                raise ValueError(
                    f"The initial state {component.name!r} should have the shape {(batch_size, size)}; received "
                    f"{tuple(state.shape)}"
                )

    def reset_state(self):
        """Puts a stateful layer back to its *initial* state (a memory of zeros could not be addressed).

        Needed also after weights were loaded or trained, where the initial state is learned.
        """
        if self.states is not None:
            for variable, state in zip(self.states, self.get_initial_state(self.states[0].shape[0]), strict=True):
                variable.assign(state)

    def get_config(self):
        """All arguments, the controller included."""
        config = super().get_config()
        del config["cell"]
        cell = self.cell.get_config()
        return {**config, **{name: cell[name] for name in _CELL_OPTIONS}, "batch_size": self.batch_size}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """The layer again, its controller included."""
        controller = keras.saving.deserialize_keras_object(config["controller_model"], custom_objects=custom_objects)
        return cls(**{**config, "controller_model": controller})


def _agree(shape, expected):
    """Whether two shapes may be the same, where None is a size that is not known yet."""
    return len(shape) == len(expected) and all(
        ours is None or theirs is None or ours == theirs for ours, theirs in zip(shape, expected, strict=True)
    )


def _weights_read_once(cell):
    """A scope in which the cell's weights are tensors read before the time loop.

    TensorFlow would otherwise read each variable in each step, and keep a copy of every weight for every step until the
    backward pass: 0.25 MB a step for an LSTM of 100. The other backends read once by themselves.
    """
    if keras.backend.backend() != "tensorflow":
        return contextlib.nullcontext()
    return keras.StatelessScope(state_mapping=[(weight, ops.copy(weight)) for weight in cell.weights])


class _Loop(NamedTuple):
    """What `keras.layers.RNN.inner_loop` asks of its layer. PyTorch cannot trace a layer made in each call."""

    cell: object
    return_sequences: bool
    go_backwards: bool
    unroll: bool
    stateful: bool = False
    zero_output_for_mask: bool = False


class _Step:
    """The cell as the time loop sees it: mask and parameter noise come as more columns of the sequence."""

    def __init__(self, cell, input_dim, noise, mask, training):
        self.cell = cell
        self.state_size = cell.state_size
        self.input_dim = input_dim
        self.noise = noise
        self.masked = mask is not None
        self.training = training

    def columns(self, sequences, mask, parameter_noise):
        """Everything that differs from step to step, side by side: ``[batch, time, columns]``."""
        parts = [sequences]
        if self.masked:
            parts.append(ops.expand_dims(ops.cast(mask, sequences.dtype), -1))
        if parameter_noise is not None:
            parts.append(parameter_noise)
        if len(parts) == 1:
            return sequences
        return ops.concatenate([ops.cast(part, self.cell.state_dtype) for part in parts], axis=-1)

    def begin(self, states, batch_size):
        """The states of the loop: the cell's, and where there is a mask the last output.

        In the loop they have their own shapes (a flat memory would keep XLA from vectorising its gradient).
        """
        states = self.cell.unflatten(states)
        if not self.masked:
            return states
        return [*states, ops.zeros((batch_size, self.cell.output_dim), dtype=self.cell.compute_dtype)]

    def __call__(self, columns, states):
        """One step of the loop."""
        states = list(states)
        inputs, rest = columns[:, : self.input_dim], columns[:, self.input_dim :]
        noise_columns = rest[:, 1:] if self.masked else rest
        noise = self.noise._replace(parameters=noise_columns) if noise_columns.shape[-1] else self.noise
        old = states[: len(self.cell.state_size)]
        output, new = self.cell.step(inputs, old, training=self.training, noise=noise)
        if not self.masked:
            return output, new
        valid = rest[:, 0] > 0.5
        kept = [
            ops.where(ops.reshape(valid, (-1, *[1] * (len(after.shape) - 1))), after, before)
            for after, before in zip([*new, output], states, strict=True)
        ]
        return kept[-1], kept

    call = __call__
