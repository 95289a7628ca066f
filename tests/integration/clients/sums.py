"""The test model of ``tests.service.support`` as a SavedModel: the same numbers to the bit."""

import json

import tensorflow as tf

from tests.service.support import INPUT_DIM, OUTPUT_DIM, STATE_SIZE, initial_state, version_of


class Sums(tf.Module):
    def __init__(self):
        super().__init__()
        self.first = tf.Variable(initial_state()[None])
        inputs = tf.TensorSpec([None, None, INPUT_DIM], tf.float32, "inputs")
        lengths, reset = tf.TensorSpec([None], tf.int32, "lengths"), tf.TensorSpec([None], tf.bool, "reset")
        state = tf.TensorSpec([None, STATE_SIZE], tf.float32, "state")
        self.step = tf.function(self._step, [inputs, lengths, reset, state], autograph=False)
        self.whole = tf.function(self._whole, [inputs], autograph=False)
        self.describe = tf.function(lambda: {"config": tf.constant(description())}, [], autograph=False)

    def _step(self, inputs, lengths, reset, state):
        batch, time = tf.shape(inputs)[0], tf.shape(inputs)[1]
        state = tf.where(reset[:, None], self.first, state)
        outputs = tf.TensorArray(tf.float32, size=time, element_shape=[None, OUTPUT_DIM])
        outputs = outputs.unstack(tf.zeros([time, batch, OUTPUT_DIM]))

        def body(now, outputs, state):
            x = inputs[:, now]
            average = 0.75 * state[:, :2] + x
            alternating = -0.5 * state[:, 2:3] + average[:, :1]
            count = state[:, 3:4] + 1.0
            after = tf.concat([average, alternating, count, x[:, :1] + x[:, 1:]], axis=1)
            output = tf.concat([average[:, :1] - average[:, 1:], alternating, count], axis=1)
            valid = (now < lengths)[:, None]
            return now + 1, outputs.write(now, tf.where(valid, output, 0.0)), tf.where(valid, after, state)

        _, outputs, state = tf.while_loop(lambda now, *_: now < time, body, (0, outputs, state))
        return {"outputs": tf.transpose(outputs.stack(), [1, 0, 2]), "state": state}

    def _whole(self, inputs):
        batch, time = tf.shape(inputs)[0], tf.shape(inputs)[1]
        state = tf.repeat(self.first, batch, axis=0)
        return {"outputs": self._step(inputs, tf.fill([batch], time), tf.zeros([batch], tf.bool), state)["outputs"]}


def description():
    version = version_of()
    layout = [
        {"name": c.name, "shape": list(c.shape), "offset": c.offset, "axes": list(c.axes)} for c in version.state_layout
    ]
    sizes = {"input_dim": INPUT_DIM, "output_dim": OUTPUT_DIM, "state_size": STATE_SIZE}
    return json.dumps({"model": "sums", "fingerprint": "f1", "state_layout": layout, "task": "sums", **sizes})


def export(directory):
    module = Sums()
    signatures = {"step": module.step, "serving_default": module.whole, "describe": module.describe}
    tf.saved_model.save(module, str(directory / "sums" / "1"), signatures=signatures)
