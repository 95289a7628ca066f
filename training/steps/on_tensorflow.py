"""Updates on TensorFlow: one graph for all of them, compiled by XLA; or each batch spread over replicas."""

from typing import Any

import tensorflow as tf

from training.steps.network import Network, Spread

Tensor = Any


class TensorFlowUpdates:
    """See `training.steps.network.Updates`."""

    def __init__(self, network: Network, *, compiled: bool, spread: Spread = None) -> None:
        self._network = network
        self._spread = spread
        # With replicas XLA compiles what each of them computes; what they tell each other is TensorFlow's.
        self._differentiate = tf.function(self._gradients, jit_compile=compiled) if spread else self._gradients
        self._run = tf.function(self._loop, jit_compile=compiled and not spread)

    def __call__(self, inputs: Any, targets: Any, masks: Any) -> tuple[float, float, float]:
        """One update for each batch."""
        loss, wrong, asked = (float(total) for total in self._run(*map(tf.convert_to_tensor, (inputs, targets, masks))))
        return loss, wrong, asked

    def _loop(self, inputs: Tensor, targets: Tensor, masks: Tensor) -> Tensor:
        totals = (tf.constant(0.0), tf.constant(0.0), tf.constant(0.0))
        update = self._update if self._spread is None else self._spread_update

        def body(index: Tensor, sums: Tensor) -> Any:
            new = update(inputs[index], targets[index], masks[index])
            return index + 1, tuple(a + b for a, b in zip(sums, new, strict=True))

        def unfinished(index: Tensor, sums: Tensor) -> Tensor:
            return index < inputs.shape[0]

        return tf.while_loop(unfinished, body, (tf.constant(0), totals))[1]

    def _update(self, inputs: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        """One update on one device."""
        gradients, sums = self._differentiate(inputs, targets, mask, inputs.shape[0])
        self._apply(gradients)
        return sums

    def _spread_update(self, inputs: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        """One update of which every replica computes its share of the rows."""
        rows = inputs.shape[0]

        def share(context: Any) -> Any:
            size, index = rows // context.num_replicas_in_sync, context.replica_id_in_sync_group
            return tuple(array[index * size : (index + 1) * size] for array in (inputs, targets, mask))

        def replica(inputs: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
            context = tf.distribute.get_replica_context()
            gradients, sums = self._differentiate(inputs, targets, mask, rows)
            gradients, sums = context.all_reduce(tf.distribute.ReduceOp.SUM, (gradients, sums))
            # Keras's optimizer sums over the replicas once more.
            self._apply(gradients, 1.0 / context.num_replicas_in_sync)
            return sums

        shares = self._spread.experimental_distribute_values_from_function(share)
        sums = self._spread.run(replica, args=shares)
        return tuple(self._spread.experimental_local_results(total)[0] for total in sums)

    def _gradients(self, inputs: Tensor, targets: Tensor, mask: Tensor, rows: int) -> tuple[Any, Any]:
        """The gradient of these rows' loss over ``rows``, and their sums."""
        with tf.GradientTape() as tape:
            loss, wrong = masked_sums(self._network.logits(inputs, training=True), targets, mask)
            objective = loss / rows
        gradients = tape.gradient(objective, [weight.value for weight in self._network.weights])
        return gradients, (loss, wrong, tf.reduce_sum(mask))

    def _apply(self, gradients: Any, scale: float = 1.0) -> None:
        network = self._network
        gradients, _ = tf.clip_by_global_norm(gradients, tf.convert_to_tensor(network.clip_norm))
        if scale != 1.0:
            gradients = [scale * gradient for gradient in gradients]
        network.optimizer.apply(gradients, network.weights)
        for average, weight in zip(network.average, network.weights, strict=True):
            average.assign(network.decay * average + (1.0 - network.decay) * weight)


def masked_sums(logits: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """`training.steps.network.masked_sums` in TensorFlow's own operations, which XLA makes one pass of."""
    loss = tf.nn.sigmoid_cross_entropy_with_logits(labels=targets, logits=logits)
    wrong = tf.cast((logits > 0) != (targets > 0.5), tf.float32)
    return tf.reduce_sum(tf.reduce_sum(loss, -1) * mask), tf.reduce_sum(tf.reduce_sum(wrong, -1) * mask)
