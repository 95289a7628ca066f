"""The graphs of an export: one TensorFlow loop over time that runs every layer of a model in each time step."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from training.exporting.stages import Component, Stage

Tensor = Any


class SequenceModel(tf.Module):  # type: ignore[misc] # TensorFlow publishes no types
    """The three signatures of the sequence model contract (docs/contract.md), as TensorFlow functions.

    Args:
        model: A built ``Sequential``; its variables are saved with the functions.
        stages: Its layers, one time step at a time.
        description: What ``describe`` returns: JSON.

    Attributes:
        step, serving_default, describe: ``tf.function``s, each returning a dict.
    """

    def __init__(self, model: keras.Sequential, stages: Sequence[Stage], description: str) -> None:
        super().__init__(name="sequence_model")
        input_dim, self._output_dim = model.input_shape[-1], model.output_shape[-1]
        self._stages = list(stages)
        self._sizes = [component.size for stage in stages for component in stage.components]
        # SavedModel keeps the variables that it finds on the object.
        self.model_variables = [variable.value for variable in model.variables]
        self.first_state = tf.Variable(first_state(stages), trainable=False, name="first_state")
        inputs = tf.TensorSpec([None, None, input_dim], tf.float32, "inputs")
        lengths = tf.TensorSpec([None], tf.int32, "lengths")
        reset = tf.TensorSpec([None], tf.bool, "reset")
        state = tf.TensorSpec([None, sum(self._sizes)], tf.float32, "state")
        self.step = tf.function(self._step, input_signature=[inputs, lengths, reset, state], autograph=False)
        self.serving_default = tf.function(self._whole, input_signature=[inputs], autograph=False)
        self.describe = tf.function(lambda: {"config": tf.constant(description)}, input_signature=[], autograph=False)

    def signatures(self) -> dict[str, Any]:
        """The functions by the names under which they are served."""
        return {"step": self.step, "serving_default": self.serving_default, "describe": self.describe}

    def _step(self, inputs: Tensor, lengths: Tensor, reset: Tensor, state: Tensor) -> dict[str, Tensor]:
        """The ``step`` signature."""
        return self._run(inputs, lengths, tf.where(reset[:, None], self.first_state, state))

    def _whole(self, inputs: Tensor) -> dict[str, Tensor]:
        """The ``serving_default`` signature: every row from the first state to its end."""
        batch, time = tf.shape(inputs)[0], tf.shape(inputs)[1]
        result = self._run(inputs, tf.fill([batch], time), tf.repeat(self.first_state, batch, axis=0))
        return {"outputs": result["outputs"]}

    def _run(self, inputs: Tensor, lengths: Tensor, state: Tensor) -> dict[str, Tensor]:
        """Runs the rows for as long as the longest of them.

        A row that is through keeps its state by a ``where`` in each step: XLA fuses it into the passes over the state
        that the step makes anyway. The outputs are collected in a buffer of zeros, so a bound that is known only at
        run time is no obstacle to compiling the loop, and one compile for the longest time serves every shorter one.
        """
        batch, time = tf.shape(inputs)[0], tf.shape(inputs)[1]
        outputs = tf.TensorArray(tf.float32, size=time, element_shape=[inputs.shape[0], self._output_dim])
        outputs = outputs.unstack(tf.zeros([time, batch, self._output_dim]))
        steps = tf.minimum(tf.reduce_max(lengths), time)

        def body(now: Tensor, outputs: tf.TensorArray, states: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
            output, new_states = self._one_step(inputs[:, now], states)
            valid = (now < lengths)[:, None]
            kept = [tf.where(valid, new, old) for new, old in zip(new_states, states, strict=True)]
            return now + 1, outputs.write(now, tf.where(valid, output, 0.0)), kept

        states = tf.split(state, self._sizes, axis=1)
        _, outputs, states = tf.while_loop(lambda now, *_: now < steps, body, (0, outputs, states))
        return {"outputs": tf.transpose(outputs.stack(), [1, 0, 2]), "state": tf.concat(states, axis=1)}

    def _one_step(self, values: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """One time step through every layer: ``[batch, width]``, and each state flat, ``[batch, size]``."""
        new_states: list[Tensor] = []
        for stage in self._stages:
            begin, end = len(new_states), len(new_states) + len(stage.components)
            shaped = [
                tf.reshape(state, [-1, *component.shape])
                for state, component in zip(states[begin:end], stage.components, strict=True)
            ]
            values, stage_states = stage.step(values, shaped)
            new_states += [
                tf.reshape(tf.cast(state, tf.float32), [-1, component.size])
                for state, component in zip(stage_states, stage.components, strict=True)
            ]
        return tf.cast(values, tf.float32), new_states


def first_state(stages: Sequence[Stage]) -> np.ndarray[Any, Any]:
    """The row in which every sequence begins, ``[1, state_size]``, float32."""
    states = [state for stage in stages for state in stage.initial_state()]
    rows = [np.asarray(ops.convert_to_numpy(ops.cast(state, "float32"))).reshape(1, -1) for state in states]
    return np.concatenate(rows, axis=1)


def components_of(stages: Sequence[Stage]) -> list[Component]:
    """The components of the row, in order."""
    return [component for stage in stages for component in stage.components]
