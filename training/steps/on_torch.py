"""Updates on PyTorch, one after the other as they are written."""

from typing import Any

import torch
from keras import ops

from training.steps.network import Network, clip_by_global_norm, masked_sums


class TorchUpdates:
    """See `training.steps.network.Updates`."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def __call__(self, inputs: Any, targets: Any, masks: Any) -> tuple[float, float, float]:
        """One update for each batch."""
        totals = [0.0, 0.0, 0.0]
        for batch in zip(inputs, targets, masks, strict=True):
            sums = self._update(*(ops.convert_to_tensor(array) for array in batch))
            totals = [total + float(new) for total, new in zip(totals, sums, strict=True)]
        return totals[0], totals[1], totals[2]

    def _update(self, inputs: Any, targets: Any, mask: Any) -> tuple[Any, Any, Any]:
        network = self._network
        weights = [weight.value for weight in network.weights]
        loss, wrong = masked_sums(network.logits(inputs, training=True), targets, mask)
        gradients = torch.autograd.grad(loss / inputs.shape[0], weights)
        with torch.no_grad():
            network.optimizer.apply(clip_by_global_norm(gradients, network.clip_norm.value), network.weights)
            for average, weight in zip(network.average, network.weights, strict=True):
                average.assign(network.decay * average + (1.0 - network.decay) * weight)
        return loss.detach(), wrong.detach(), mask.sum()
