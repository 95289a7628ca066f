"""Many updates in one call, on each of Keras's backends: one file for each; they agree to float tolerance."""

import keras

from training.steps.network import Network, Spread, Updates, forward


def make_updates(network: Network, *, compiled: bool, spread: Spread = None) -> Updates:
    """The updates of a network, on the backend that Keras runs on.

    Args:
        network: what is trained.
        compiled: whether XLA compiles them, on TensorFlow; JAX always compiles, PyTorch runs them as they are written.
        spread: of `training.steps.devices.Devices`; None for one device.
    """
    # Imported late: each needs a backend that may not be installed.
    if keras.backend.backend() == "jax":
        from training.steps.on_jax import JaxUpdates

        return JaxUpdates(network, spread=spread)
    if keras.backend.backend() == "torch":
        from training.steps.on_torch import TorchUpdates

        return TorchUpdates(network)
    from training.steps.on_tensorflow import TensorFlowUpdates

    return TensorFlowUpdates(network, compiled=compiled, spread=spread)


__all__ = ["Network", "Spread", "Updates", "forward", "make_updates"]
