"""Updates on JAX: the whole state goes in and comes out of one compiled scan."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import keras
import numpy as np

from ntm.attention import written_out
from training.steps.network import Network, Spread, clip_by_global_norm, masked_sums
from training.steps.scans import with_late_gradients

# What separates the seeds of two devices: odd, far from the small numbers that people seed with.
_SEEDS_APART = np.uint32(0x9E3779B9)
# Whole vectors where the processor has them, which XLA does not take by itself; and no copy of a loop's state that a
# closer look finds unnecessary. Neither changes what is computed.
_CPU_OPTIONS = {"xla_cpu_prefer_vector_width": 512, "xla_cpu_copy_insertion_use_region_analysis": True}


class _State(NamedTuple):
    """The values of the variables that an update may change."""

    weights: Sequence[Any]
    average: Sequence[Any]
    optimizer: Sequence[Any]
    # Seeds; what only schedules change, as the noise, goes through unchanged.
    others: Sequence[Any]


class JaxUpdates:
    """See `training.steps.network.Updates`."""

    def __init__(self, network: Network, *, spread: Spread = None) -> None:
        self._network = network
        self._spread = spread
        others = network.logits.non_trainable_variables
        self._variables = _State(network.weights, network.average, network.optimizer.variables, others)
        self._run = jax.jit(self._scan, compiler_options=_CPU_OPTIONS if jax.default_backend() == "cpu" else None)

    def __call__(self, inputs: Any, targets: Any, masks: Any) -> tuple[float, float, float]:
        """One update for each batch."""
        state = _State(*([variable.value for variable in part] for part in self._variables))
        batches = tuple(self._place(array) for array in (inputs, targets, masks))
        state, sums = self._run(state, self._network.clip_norm.value, batches)
        for variables, values in zip(self._variables, state, strict=True):
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)
        loss, wrong, asked = (float(column.sum()) for column in sums)
        return loss, wrong, asked

    def _place(self, array: Any) -> Any:
        """With several devices, each gets its share of the rows; what follows is partitioned by the compiler."""
        if self._spread is None:
            return array
        axes = [None, self._spread.batch_dim_name, *(None for _ in array.shape[2:])]
        layout = keras.distribution.TensorLayout(axes, self._spread.device_mesh)
        return keras.distribution.distribute_tensor(keras.ops.convert_to_tensor(array), layout)

    def _scan(self, state: _State, clip_norm: Any, batches: Any) -> Any:
        def update(state: _State, batch: Any) -> Any:
            return self._update(state, clip_norm, *batch)

        return jax.lax.scan(update, state, batches)

    def _update(self, state: _State, clip_norm: Any, inputs: Any, targets: Any, mask: Any) -> Any:
        """The state after one update, and the update's sums."""
        network = self._network
        differentiate = functools.partial(self._gradients, rows=inputs.shape[0])
        if self._spread is not None:
            differentiate = self._shared_out(differentiate)
        gradients, others, sums = differentiate(state.weights, state.others, inputs, targets, mask)
        gradients = clip_by_global_norm(gradients, clip_norm)
        weights, optimizer = network.optimizer.stateless_apply(state.optimizer, gradients, state.weights)
        keep = network.decay
        average = [keep * old + (1.0 - keep) * new for old, new in zip(state.average, weights, strict=True)]
        return _State(weights, average, optimizer, others), sums

    def _gradients(self, weights: Any, others: Any, inputs: Any, targets: Any, mask: Any, *, rows: int) -> Any:
        """The gradient of these rows' loss over ``rows``, the variables that a call changes, and these rows' sums."""

        def objective(weights: Any) -> Any:
            with written_out():
                logits, changed = self._network.logits.stateless_call(weights, others, inputs, training=True)
            loss, wrong = masked_sums(logits, targets, mask)
            return loss / rows, (loss, wrong, changed)

        differentiate = jax.grad(with_late_gradients(objective), has_aux=True)
        gradients, (loss, wrong, changed) = differentiate(weights)
        return gradients, changed, (loss, wrong, mask.sum())

    def _shared_out(self, differentiate: Any) -> Any:
        """Each device on its share of the rows; what they found is summed once, after their time loops.

        Left to the compiler, the devices would meet in every time step, over the gradient of every weight.
        """
        mesh, axis = self._spread.device_mesh.backend_mesh, self._spread.batch_dim_name

        def share(weights: Any, others: Any, *batch: Any) -> Any:
            # Every device draws noise of its own. The seeds go on as those of the first.
            ahead = jax.lax.axis_index(axis).astype("uint32") * _SEEDS_APART
            gradients, others, sums = differentiate(weights, _moved(others, ahead), *batch)
            gradients, sums = jax.lax.psum((gradients, sums), axis)
            return gradients, _moved(others, -ahead), sums

        whole, rows = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec(axis)
        return jax.shard_map(
            share, mesh=mesh, in_specs=(whole, whole, rows, rows, rows), out_specs=whole, check_vma=False
        )


def _moved(variables: Any, ahead: Any) -> list[Any]:
    """The values, with the seeds of random numbers among them moved."""
    return [value.at[0].add(ahead) if value.dtype == "uint32" else value for value in variables]
