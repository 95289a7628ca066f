"""The model of the chaos suite: a hash of all that it was ever fed, exact in float32, as a SavedModel and in NumPy.

The state is many counters modulo a prime, each an affine step of its own. A step that is lost, repeated, applied to
another session or to an old state changes every output after it, and outputs are compared for equality.

    python -m tests.chaos.model DIRECTORY     writes DIRECTORY/chain/1
"""

import json
import sys
from pathlib import Path

import numpy as np

NAME, FINGERPRINT = "chain", "chain-256"
PRIME, STATE_SIZE, OUTPUT_DIM = 4093, 256, 4

_places = np.arange(STATE_SIZE, dtype=np.int32)
FACTORS = 2 + (977 * _places) % 3999
TERMS = 1 + (1033 * _places) % 4001
INITIAL = (17 + 31 * _places) % PRIME


class Chain:
    """The undisturbed run of one session."""

    def __init__(self):
        self.state = INITIAL

    def step(self, inputs):
        """``inputs`` ``[time, 1]``; returns ``[time, 4]``."""
        outputs = np.zeros((len(inputs), OUTPUT_DIM), np.float32)
        for number, x in enumerate(inputs[:, 0].astype(np.int32)):
            self.state = (FACTORS * self.state + TERMS + x) % PRIME
            outputs[number] = [*self.state[[0, 1, STATE_SIZE // 2]], self.state.sum()]
        return outputs


def export(directory):
    """Writes the SavedModel. Imports TensorFlow."""
    import tensorflow as tf

    def advance(x, lengths, state):
        """``x`` ``[batch, time]``, ``lengths`` ``[batch]``, ``state`` ``[batch, state_size]``, all int32."""
        steps = tf.shape(x)[1]

        def body(time, state, outputs):
            live = (time < lengths)[:, tf.newaxis]
            state = tf.where(live, (FACTORS * state + TERMS + x[:, time, tf.newaxis]) % PRIME, state)
            shown = tf.stack([state[:, 0], state[:, 1], state[:, STATE_SIZE // 2], tf.reduce_sum(state, 1)], 1)
            return time + 1, state, outputs.write(time, tf.where(live, shown, 0))

        outputs = tf.TensorArray(tf.int32, steps, element_shape=(None, OUTPUT_DIM))
        _, state, outputs = tf.while_loop(lambda time, *_: time < steps, body, (0, state, outputs))
        outputs = tf.ensure_shape(tf.transpose(outputs.stack(), (1, 0, 2)), (None, None, OUTPUT_DIM))
        return tf.cast(outputs, tf.float32), tf.cast(state, tf.float32)

    class Module(tf.Module):
        @tf.function(
            input_signature=[
                tf.TensorSpec((None, None, 1), tf.float32, "inputs"),
                tf.TensorSpec((None,), tf.int32, "lengths"),
                tf.TensorSpec((None,), tf.bool, "reset"),
                tf.TensorSpec((None, STATE_SIZE), tf.float32, "state"),
            ]
        )
        def step(self, inputs, lengths, reset, state):
            begin = tf.where(reset[:, tf.newaxis], INITIAL, tf.cast(state, tf.int32))
            outputs, state = advance(tf.cast(inputs[:, :, 0], tf.int32), lengths, begin)
            return {"outputs": outputs, "state": state}

        @tf.function(input_signature=[tf.TensorSpec((None, None, 1), tf.float32, "inputs")])
        def whole(self, inputs):
            rows, steps = tf.shape(inputs)[0], tf.shape(inputs)[1]
            begin = tf.repeat(INITIAL[np.newaxis], rows, 0)
            outputs, _ = advance(tf.cast(inputs[:, :, 0], tf.int32), tf.fill([rows], steps), begin)
            return {"outputs": outputs}

        @tf.function(input_signature=[])
        def describe(self):
            return {"config": tf.constant(json.dumps(description()))}

    module = Module()
    signatures = {"step": module.step, "serving_default": module.whole, "describe": module.describe}
    tf.saved_model.save(module, str(Path(directory) / NAME / "1"), signatures)


def description():
    """What the model says about itself."""
    return {
        "name": NAME,
        "fingerprint": FINGERPRINT,
        "input_dim": 1,
        "output_dim": OUTPUT_DIM,
        "state_size": STATE_SIZE,
        "state_layout": [{"name": "counters", "shape": [STATE_SIZE], "offset": 0, "axes": ["counter"]}],
        "keras_config": "{}",
        "task": "chaos",
    }


if __name__ == "__main__":
    export(sys.argv[1])
