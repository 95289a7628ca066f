"""Reading and writing a memory, ``[batch, depth, slots]``: sections 3.1 and 3.2 of Graves et al. (2014)."""

from keras import ops


def read(memory, weighting):
    """What each head reads: equation (2).

    Args:
        memory: ``[batch, depth, slots]``.
        weighting: ``[batch, heads, slots]``.

    Returns:
        ``[batch, heads, depth]``.
    """
    return ops.matmul(weighting, ops.transpose(memory, (0, 2, 1)))


def erase_and_add(memory, weighting, erase, add):
    """The memory after every head has written: equations (3) and (4), all erases before all adds.

    Args:
        memory: ``[batch, depth, slots]``.
        weighting: ``[batch, heads, slots]``.
        erase: ``[batch, heads, depth]`` in 0..1.
        add: ``[batch, heads, depth]``.

    Returns:
        ``[batch, depth, slots]``.
    """
    heads = [
        (weighting[:, head, None, :], erase[:, head, :, None], add[:, head, :, None]) for head in range(erase.shape[1])
    ]
    for focus, erased, _ in heads:
        memory = memory * (1.0 - focus * erased)
    for focus, _, added in heads:
        memory = memory + focus * added
    return memory
