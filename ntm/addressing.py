"""Addressing a memory: one function for each equation of Graves, Wayne and Danihelka (2014), section 3.3.

Shapes are named ``batch``, ``heads``, ``slots`` (the paper's N), ``depth`` (its M) and ``shifts``. The memory is held
as ``[batch, depth, slots]``: the slots lie side by side, so that every pass over it runs on whole vectors of slots. All
functions keep the dtype they are given; the cell gives them float32 or float64. (Hence operators where Keras has both:
`ops.matmul` and `ops.maximum` round float64 to float32 on PyTorch.)
"""

import math

from keras import ops

# Added to squared norms, inside the square root. A fresh memory of 1e-6 in 20 places has the squared norm 2e-11, and
# must still be seen in its true direction.
NORM_EPSILON = 1e-12
# Weightings are kept above this inside the logarithm of `sharpen`.
WEIGHTING_EPSILON = 1e-16


def shift_offsets(shift_range):
    """The offset in slots of each entry of a shift distribution.

    Entry 0 moves the focus furthest back and the last entry furthest forward: ``(-1, 0, 1)`` for a range of 3 and
    ``(-1, 0, 1, 2)`` for a range of 4. An offset of +1 moves the weight of slot 0 to slot 1.

    Args:
        shift_range: how many neighbouring offsets there are, at least 1.

    Returns:
        A tuple of ``shift_range`` integers.
    """
    first = -((shift_range - 1) // 2)
    return tuple(range(first, first + shift_range))


def cosine_similarity(keys, memory):
    """Cosine between each key and each slot: equation (6).

    Args:
        keys: ``[batch, heads, depth]``, the paper's k.
        memory: ``[batch, depth, slots]``, the paper's M.

    Returns:
        ``[batch, heads, slots]``, in -1..1. A zero key or slot has a similarity of 0.
    """
    squared_norms = ops.sum(ops.square(memory), axis=1)
    key_scale = ops.rsqrt(ops.sum(ops.square(keys), axis=-1, keepdims=True) + NORM_EPSILON)
    return keys @ memory * key_scale * ops.rsqrt(squared_norms + NORM_EPSILON)[:, None, :]


def content_weighting(similarity, strength):
    """Focus by content: equation (5).

    Args:
        similarity: ``[batch, heads, slots]``.
        strength: ``[batch, heads, 1]``, the paper's beta, at least 0.

    Returns:
        ``[batch, heads, slots]``; sums to one over the slots.
    """
    return ops.softmax(strength * similarity, axis=-1)


def interpolate(content, previous, gate):
    """Choose between the content focus and the previous one: equation (7).

    Args:
        content: ``[batch, heads, slots]``.
        previous: ``[batch, heads, slots]``, the weighting of the step before.
        gate: ``[batch, heads, 1]`` in 0..1, the paper's g: 1 takes the content focus, 0 the previous one.

    Returns:
        ``[batch, heads, slots]``.
    """
    return previous + gate * (content - previous)


def shift(weighting, distribution):
    """Rotate the focus: the circular convolution of equation (8).

    Args:
        weighting: ``[batch, heads, slots]``.
        distribution: ``[batch, heads, shifts]``, the paper's s; entry j moves weight by ``shift_offsets(shifts)[j]``
            slots, around the end.

    Returns:
        ``[batch, heads, slots]``.
    """
    slots, offsets = weighting.shape[-1], shift_offsets(distribution.shape[-1])
    forward, back = offsets[-1], -offsets[0]
    # ring[i + forward] = weighting[i]: the few slots that wrap are put on either side, so each offset is a plain slice.
    ring = ops.concatenate([weighting[..., slots - forward :], weighting, weighting[..., :back]], axis=-1)
    shifted = 0.0
    for index, offset in enumerate(offsets):
        start = forward - offset
        shifted = shifted + distribution[..., index : index + 1] * ring[..., start : start + slots]
    return shifted


def sharpen(weighting, gamma):
    """Undo the blur of the shift: equation (9), ``w ** gamma`` made to sum to one.

    Computed as a softmax of logarithms, because the power of a small weight underflows float32 (1/128 to the power 18).
    Weights under `WEIGHTING_EPSILON` count as that much.

    Args:
        weighting: ``[batch, heads, slots]``.
        gamma: ``[batch, heads, 1]``, at least 1.

    Returns:
        ``[batch, heads, slots]``; sums to one over the slots.
    """
    return ops.softmax(gamma * ops.log(ops.clip(weighting, WEIGHTING_EPSILON, math.inf)), axis=-1)


def address(memory, previous, *, key, strength, gate, shifts, gamma):
    """The whole of figure 2: from head parameters to the new weighting of each head.

    Args:
        memory: ``[batch, depth, slots]``.
        previous: ``[batch, heads, slots]``.
        key: ``[batch, heads, depth]``.
        strength: ``[batch, heads, 1]``.
        gate: ``[batch, heads, 1]``.
        shifts: ``[batch, heads, shifts]``.
        gamma: ``[batch, heads, 1]``.

    Returns:
        ``[batch, heads, slots]``; sums to one over the slots.
    """
    content = content_weighting(cosine_similarity(key, memory), strength)
    return sharpen(shift(interpolate(content, previous, gate), shifts), gamma)
