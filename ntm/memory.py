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
    # The small tensor is transposed, never the memory.
    return ops.transpose(memory @ ops.transpose(weighting, (0, 2, 1)), (0, 2, 1))


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
    # Matrix products, though the inner dimension is one: their gradients are products too, where those of a broadcast
    # multiplication are sums that compilers do not vectorise.
    for head in range(erase.shape[1]):
        memory = memory * (1.0 - erase[:, head, :, None] @ weighting[:, head, None, :])
    return memory + ops.transpose(add, (0, 2, 1)) @ weighting
