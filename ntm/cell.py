"""One time step of a Neural Turing Machine, with its whole state in and its whole state out."""

from typing import NamedTuple

import keras
from keras import ops

from ntm import addressing, attention, memory, parameters
from ntm.controllers import Controller, StateComponent
from ntm.float64 import dense, tanh

# A first weighting is the softmax of logits that are this at slot 0 and zero elsewhere: with 128 slots it holds 96 %.
FIRST_FOCUS = 8.0


class StepNoise(NamedTuple):
    """What is random in training, drawn before the time loop. None stands for no noise."""

    # [batch, input_dim] and [batch, read_heads * m_depth]: one dropout mask for all steps.
    inputs_mask: object = None
    reads_mask: object = None
    # [batch, width of the head parameters]: for this one step.
    parameters: object = None


@keras.saving.register_keras_serializable(package="ntm")
class NTMCell(keras.layers.Layer):
    """One step of an NTM: for `keras.layers.RNN`, for stepping by hand, and inside `NeuralTuringMachine`.

    The states are rank 2 and in a list; ``state_layout`` says what each of them is. In a step, the controller sees the
    input and the vectors read in the step before; every head addresses the memory as the step before left it; the
    write heads write; the read heads read what is now there.

    Args: see `ntm.layer.NeuralTuringMachine`.

    Call arguments:
        inputs: ``[batch, input_dim]``.
        states: a list, as ``get_initial_state`` or the last call gave it.
        training: whether the controller's dropout is on.
        noise: a `StepNoise`, where dropout or parameter noise is wanted. The layer draws it.
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
        **kwargs,
    ):
        # Values are cast by hand: the addressing and the states stay in float32 under a float16 policy.
        super().__init__(autocast=False, **kwargs)
        _check_sizes(output_dim=output_dim, n_slots=n_slots, m_depth=m_depth, shift_range=shift_range)
        _check_sizes(read_heads=read_heads, write_heads=write_heads)
        if shift_range > n_slots:
            raise ValueError(f"shift_range should be at most n_slots; received {shift_range} and {n_slots}")
        if controller_units is not None and controller_model is not None:
            raise ValueError("Give controller_model or controller_units, not both")
        _check_rates(dropout=dropout, recurrent_dropout=recurrent_dropout)
        if parameter_noise < 0:
            raise ValueError(f"parameter_noise should be 0 or more; received {parameter_noise!r}")
        if memory_value == 0:
            raise ValueError("memory_value should not be zero: a slot of zeros has no direction to be found by")
        self.output_dim = self.output_size = output_dim
        self.n_slots = n_slots
        self.m_depth = m_depth
        self.shift_range = shift_range
        self.controller_model = controller_model
        self.read_heads = read_heads
        self.write_heads = write_heads
        self.activation = keras.activations.get(activation)
        self.controller_units = controller_units
        self.project_controller = controller_units is not None if project_controller is None else project_controller
        self.memory_value = memory_value
        self.learn_memory = learn_memory
        self.learn_weightings = self.project_controller if learn_weightings is None else learn_weightings
        self.parameter_clip = parameter_clip
        self.parameter_noise = parameter_noise
        self.dropout = dropout
        self.recurrent_dropout = recurrent_dropout
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.head_parameters = parameters.head_parameters(m_depth, shift_range, read_heads, write_heads)
        self._make_controller()
        self.state_size = [_size(component.shape) for component in self.state_layout]

    def _make_controller(self):
        """The controller and, in the paper form, the two projections of what it says."""
        policy = self.dtype_policy
        if self.controller_units is not None:
            self._dense = dense(self.controller_units, tanh, dtype=policy, name="controller")
        elif self.controller_model is None:
            self._dense = dense(self._spoken_width, dtype=policy, name="controller")
        else:
            self._dense = None
        self.controller = Controller(self._dense if self.controller_model is None else self.controller_model)
        if self.project_controller:
            self.parameter_projection = dense(self.parameters_width, dtype=policy, name="parameters")
            self.output_projection = dense(self.output_dim, dtype=policy, name="output")

    @property
    def parameters_width(self):
        """How many head parameters there are in a step."""
        return parameters.width(self.head_parameters)

    @property
    def _spoken_width(self):
        """What a controller without projections has to say in a step."""
        return self.output_dim + self.parameters_width

    @property
    def state_dtype(self):
        """The dtype of the states and of the addressing: float32 at least."""
        return "float32" if self.compute_dtype in ("float16", "bfloat16") else self.compute_dtype

    @property
    def state_layout(self):
        """One `StateComponent` (name, shape, axes) for each state, in order; a state is ``[batch, prod(shape)]``."""
        slots, depth = self.n_slots, self.m_depth
        return (
            StateComponent("memory", (depth, slots), ("depth", "slots")),
            StateComponent("read_vectors", (self.read_heads, depth), ("heads", "depth")),
            StateComponent("read_weightings", (self.read_heads, slots), ("heads", "slots")),
            StateComponent("write_weightings", (self.write_heads, slots), ("heads", "slots")),
            *self.controller.components,
        )

    def build(self, input_shape):
        """Makes the weights; refuses a controller whose widths do not fit."""
        input_width = input_shape[-1] + self.read_heads * self.m_depth
        width = self.controller.build(input_width)
        if self.project_controller:
            self.parameter_projection.build((None, width))
            self.output_projection.build((None, width + self.read_heads * self.m_depth))
        elif width != self._spoken_width:
            raise ValueError(
                f"The controller's output has the width {width}, but should have {self._spoken_width}: output_dim "
                f"{self.output_dim} and {self.parameters_width} head parameters (see "
                "controller_input_output_shape). With project_controller=True the layer projects any width itself."
            )
        if self.learn_memory:
            self.first_memory = self.add_weight(
                (self.m_depth, self.n_slots), keras.initializers.Constant(self.memory_value), name="first_memory"
            )
        if self.learn_weightings:
            self.first_weighting_logits = self.add_weight(
                (self.read_heads + self.write_heads, self.n_slots), _first_focus, name="first_weighting_logits"
            )

    def get_initial_state(self, batch_size=None):
        """The state before the first step.

        Args:
            batch_size: an integer or a scalar tensor.

        Returns:
            A list with one ``[batch, size]`` for each entry of ``state_layout``.
        """
        dtype = self.state_dtype
        if self.learn_memory:
            first_memory = ops.cast(self.first_memory, dtype)
        else:
            first_memory = ops.full((self.m_depth, self.n_slots), self.memory_value, dtype=dtype)
        heads = (self.read_heads + self.write_heads, self.n_slots)
        logits = self.first_weighting_logits if self.learn_weightings else _first_focus(heads, dtype)
        weightings = ops.softmax(ops.cast(logits, dtype), axis=-1)
        reads = memory.read(first_memory[None], weightings[None, : self.read_heads])
        first = [first_memory, reads, weightings[: self.read_heads], weightings[self.read_heads :]]
        # Copied, since PyTorch repeats a single row as a view: a stateful layer's variables could not be assigned.
        rows = [ops.copy(ops.repeat(ops.reshape(value, (1, -1)), batch_size, axis=0)) for value in first]
        return rows + [ops.cast(state, dtype) for state in self.controller.initial_state(batch_size)]

    def call(self, inputs, states, training=False, noise=None):
        """One step. Returns ``[batch, output_dim]`` and the new list of states."""
        output, new_states = self.step(inputs, self.unflatten(states), training=training, noise=noise)
        return output, self.flatten(new_states)

    def unflatten(self, states):
        """The states in their own shapes, ``[batch, *shape]`` for each entry of ``state_layout``."""
        shapes = [component.shape for component in self.state_layout]
        return [
            ops.reshape(ops.cast(state, self.state_dtype), (-1, *shape))
            for state, shape in zip(states, shapes, strict=True)
        ]

    def flatten(self, states):
        """Back from `unflatten`: each state as ``[batch, size]``."""
        return [ops.reshape(state, (-1, size)) for state, size in zip(states, self.state_size, strict=True)]

    def step(self, inputs, states, *, training=False, noise=None):
        """`call` on states in their own shapes (see `unflatten`)."""
        noise = noise or StepNoise()
        spoken, raw, controller_states = self.consult(inputs, states, training=training, noise=noise)
        attend = self._attend_in_training() if training else self._attend
        attended = attend(raw, states[0], states[2], states[3])
        return self._output(spoken, attended[1]), [*attended, *controller_states]

    def _attend_in_training(self):
        """`_attend`, at less cost for its gradient."""
        if attention.is_written_out():
            return lambda raw, *states: attention.attend(*states, parameters.split(raw, self.head_parameters))
        # Keep only what goes in, and compute the rest again in the backward pass: the memory is by far the largest
        # thing that would be kept for each step. PyTorch runs eagerly, where computing twice costs more.
        return self._attend if keras.backend.backend() == "torch" else keras.remat(self._attend)

    def consult(self, inputs, states, *, training=False, noise=None):
        """Runs the controller for one step.

        Args:
            inputs: ``[batch, input_dim]``.
            states: in their own shapes.
            training: as in `call`.
            noise: as in `call`.

        Returns:
            The controller's output ``[batch, units]``; the raw head parameters ``[batch, parameters_width]``, which
            `ntm.parameters.split` takes apart with the table ``head_parameters``; the controller's new states.
        """
        noise = noise or StepNoise()
        spoken, controller_states = self._run_controller(inputs, states[1], states[4:], training, noise)
        controller_states = [ops.cast(state, self.state_dtype) for state in controller_states]
        return spoken, self._raw_parameters(spoken, noise), controller_states

    def _attend(self, raw, tape, read_weightings, write_weightings):
        """Addresses, writes and reads: from raw head parameters and three states to the four states that follow."""
        said = parameters.split(raw, self.head_parameters)
        heads = {name: said[name] for name in ("key", "strength", "gate", "shifts", "gamma")}
        previous = ops.concatenate([read_weightings, write_weightings], axis=1)
        weightings = addressing.address(tape, previous, **heads)
        read_weightings, write_weightings = weightings[:, : self.read_heads], weightings[:, self.read_heads :]
        tape = memory.erase_and_add(tape, write_weightings, said["erase"], said["add"])
        return tape, memory.read(tape, read_weightings), read_weightings, write_weightings

    def _run_controller(self, inputs, reads, states, training, noise):
        """The controller on the input beside the vectors last read."""
        reads = ops.reshape(reads, (-1, self.read_heads * self.m_depth))
        inputs = ops.cast(inputs, self.compute_dtype)
        reads = ops.cast(reads, self.compute_dtype)
        if noise.inputs_mask is not None:
            inputs = inputs * ops.cast(noise.inputs_mask, inputs.dtype)
        if noise.reads_mask is not None:
            reads = reads * ops.cast(noise.reads_mask, reads.dtype)
        states = [ops.cast(state, self.compute_dtype) for state in states]
        return self.controller(ops.concatenate([inputs, reads], axis=-1), states, training)

    def _raw_parameters(self, spoken, noise):
        """What the controller says to the heads, clipped: ``[batch, parameters_width]``."""
        raw = self.parameter_projection(spoken) if self.project_controller else spoken[:, self.output_dim :]
        raw = ops.cast(raw, self.state_dtype)
        if noise.parameters is not None:
            raw = raw + ops.cast(noise.parameters, raw.dtype)
        return raw if self.parameter_clip is None else ops.clip(raw, -self.parameter_clip, self.parameter_clip)

    def _output(self, spoken, reads):
        """The step's output, ``[batch, output_dim]``, from ``[batch, units]`` and ``[batch, read_heads, depth]``."""
        if not self.project_controller:
            return self.activation(ops.cast(spoken[:, : self.output_dim], self.compute_dtype))
        reads = ops.reshape(ops.cast(reads, spoken.dtype), (-1, self.read_heads * self.m_depth))
        seen = ops.concatenate([spoken, reads], axis=-1)
        return self.activation(self.output_projection(seen))

    def get_config(self):
        """All arguments, the controller included."""
        return {
            **super().get_config(),
            "output_dim": self.output_dim,
            "n_slots": self.n_slots,
            "m_depth": self.m_depth,
            "shift_range": self.shift_range,
            "controller_model": keras.saving.serialize_keras_object(self.controller_model),
            "read_heads": self.read_heads,
            "write_heads": self.write_heads,
            "activation": keras.activations.serialize(self.activation),
            "controller_units": self.controller_units,
            "project_controller": self.project_controller,
            "memory_value": self.memory_value,
            "learn_memory": self.learn_memory,
            "learn_weightings": self.learn_weightings,
            "parameter_clip": self.parameter_clip,
            "parameter_noise": float(self.parameter_noise),
            "dropout": self.dropout,
            "recurrent_dropout": self.recurrent_dropout,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config):
        """The cell again, its controller included."""
        controller = keras.saving.deserialize_keras_object(config["controller_model"])
        return cls(**{**config, "controller_model": controller})


def _first_focus(shape, dtype=None):
    """Logits ``[heads, slots]`` that point at slot 0: equal slots would stay equal for ever."""
    return FIRST_FOCUS * ops.one_hot(ops.zeros(shape[0], dtype="int32"), shape[1], dtype=dtype)


def _size(shape):
    size = 1
    for dim in shape:
        size *= dim
    return size


def _check_sizes(**sizes):
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} should be an integer of at least 1; received {value!r}")


def _check_rates(**rates):
    for name, value in rates.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} should be in 0..1; received {value!r}")
