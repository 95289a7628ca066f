"""What the heads do in a step of training: address, write, read, with the gradient written out.

`attend` gives what `NTMCell` computes with `ntm.addressing` and `ntm.memory`. Its gradient is written out because the
memory is by far the largest thing in a step, and differentiation of the separate functions passes over it more often,
in layouts that compilers do not vectorise. It serves reverse mode only, and pays where what is kept for it is chosen
well: `training.steps.scans` does so on JAX. Hence it is used within `written_out` alone.

Shapes are named as in `ntm.addressing`; all functions keep the dtype they are given.
"""

import contextlib
import contextvars
from typing import NamedTuple

from keras import ops

from ntm import addressing, memory

_WRITTEN_OUT = contextvars.ContextVar("written_out", default=False)


@contextlib.contextmanager
def written_out():
    """Within, the cells of a layer that is called with ``training=True`` use `attend`. Not for PyTorch."""
    token = _WRITTEN_OUT.set(True)
    try:
        yield
    finally:
        _WRITTEN_OUT.reset(token)


def is_written_out():
    """Whether this is within `written_out`."""
    return _WRITTEN_OUT.get()


class _Softmax(NamedTuple):
    """A softmax that remembers what its gradient needs."""

    values: object
    # Before they were divided by their total: [batch, heads, slots] and [batch, heads, 1].
    powers: object
    total: object


class _Focus(NamedTuple):
    """What addressing leaves for the gradient: ``[batch, heads, slots]`` but for the two scales."""

    key_scale: object  # [batch, heads, 1]
    slot_scale: object  # [batch, 1, slots]
    similarity: object
    content: _Softmax
    gated: object
    shifted: object
    logarithms: object
    weighting: _Softmax


def attend(tape, read_weightings, write_weightings, said):
    """Addresses, writes and reads.

    Args:
        tape: the memory, ``[batch, depth, slots]``.
        read_weightings: ``[batch, read_heads, slots]``, of the step before.
        write_weightings: ``[batch, write_heads, slots]``, of the step before.
        said: the head parameters, as `ntm.parameters.split` names and shapes them.

    Returns:
        The new memory, the vectors read ``[batch, read_heads, depth]``, and the new weightings of both kinds.
    """
    names = tuple(said)

    @ops.custom_gradient
    def run(tape, read_weightings, write_weightings, *values):
        said = dict(zip(names, values, strict=True))
        previous = ops.concatenate([read_weightings, write_weightings], axis=1)
        focus = _address(tape, previous, said)
        reading, writing = _parted(focus.weighting.values, read_weightings.shape[1])
        after = memory.erase_and_add(tape, writing, said["erase"], said["add"])

        def gradient(*upstream):
            # JAX hands over one tuple.
            after_up, reads_up, *weightings_up = upstream[0] if len(upstream) == 1 else upstream
            written, weightings_down, told = _write_gradient(tape, reading, writing, said, after_up, reads_up)
            weightings_up = ops.concatenate(
                [up + down for up, down in zip(weightings_up, weightings_down, strict=True)], axis=1
            )
            addressed, previous_up, more = _address_gradient(tape, previous, said, focus, weightings_up)
            told |= more
            parts = _parted(previous_up, read_weightings.shape[1])
            return (written + addressed, *parts, *(told[name] for name in names))

        return (after, memory.read(after, reading), reading, writing), gradient

    return run(tape, read_weightings, write_weightings, *said.values())


def _address(tape, previous, said):
    """`addressing.address`, keeping what lies between."""
    key_scale = ops.rsqrt(_total(ops.square(said["key"])) + addressing.NORM_EPSILON)
    slot_scale = ops.rsqrt(ops.sum(ops.square(tape), axis=1) + addressing.NORM_EPSILON)[:, None, :]
    similarity = said["key"] @ tape * key_scale * slot_scale
    content = _softmax(said["strength"] * similarity)
    gated = addressing.interpolate(content.values, previous, said["gate"])
    shifted = addressing.shift(gated, said["shifts"])
    logarithms = ops.log(ops.maximum(shifted, addressing.WEIGHTING_EPSILON))
    weighting = _softmax(said["gamma"] * logarithms)
    return _Focus(key_scale, slot_scale, similarity, content, gated, shifted, logarithms, weighting)


def _address_gradient(tape, previous, said, focus, upstream):
    """The gradient of `_address`, backwards through figure 2.

    Returns:
        Those of the memory ``[batch, depth, slots]`` and of the previous weightings; and of the parameters, by name.
    """
    powers = _softmax_gradient(focus.weighting, upstream)
    shifted = said["gamma"] * powers / ops.maximum(focus.shifted, addressing.WEIGHTING_EPSILON)
    shifted = ops.where(focus.shifted > addressing.WEIGHTING_EPSILON, shifted, 0.0)
    gated, shifts = _shift_gradient(focus.gated, said["shifts"], shifted)
    logits = _softmax_gradient(focus.content, said["gate"] * gated)
    # The norms of key and slots: a similarity falls by itself, times the squared scale, as the vector grows.
    shares = logits * focus.similarity
    strength = _total(shares)
    slots = -focus.slot_scale * focus.slot_scale * ops.sum(said["strength"] * shares, axis=1, keepdims=True)
    products = said["strength"] * focus.key_scale * logits * focus.slot_scale
    key_norm = focus.key_scale * focus.key_scale * said["strength"] * strength
    told = {
        "key": _over_slots(tape, products) - said["key"] * key_norm,
        "strength": strength,
        "gate": _total(gated * (focus.content.values - previous)),
        "shifts": shifts,
        "gamma": _total(powers * focus.logarithms),
    }
    return _turned(said["key"]) @ products + tape * slots, gated * (1.0 - said["gate"]), told


def _write_gradient(tape, reading, writing, said, after_up, reads_up):
    """The gradient of `memory.erase_and_add` and of `memory.read` after it.

    Returns:
        That of the memory; those of read and write weightings; and of the parameters, by name.
    """
    erase, add = said["erase"], said["add"]
    after_up = after_up + _turned(reads_up) @ reading
    kept = [1.0 - erase[:, head, :, None] @ writing[:, head, None, :] for head in range(erase.shape[1])]
    # What each head found: the memory, and what the other heads left of it.
    found = [_product([tape, *kept[:head], *kept[head + 1 :]]) for head in range(len(kept))]
    losses = [after_up * left for left in found]
    rows = [erase[:, head : head + 1] @ loss for head, loss in enumerate(losses)]
    erased = [_over_slots(loss, writing[:, head : head + 1]) for head, loss in enumerate(losses)]
    # Reading the new memory, from what the first head found of the old.
    first = writing[:, :1] * ((reads_up * erase[:, :1]) @ found[0])
    read_down = reads_up @ found[0] - first + reads_up @ _turned(add) @ writing
    told = {"erase": -_joined(erased), "add": _over_slots(after_up, writing)}
    return after_up * _product(kept), (read_down, add @ after_up - _joined(rows)), told


def _shift_gradient(weighting, distribution, upstream):
    """The gradient of `addressing.shift`: of the weighting, and of the distribution ``[batch, heads, shifts]``."""
    offsets = addressing.shift_offsets(distribution.shape[-1])
    moved = _rolled(weighting, offsets)
    shares = ops.concatenate([_total(upstream * values) for values in moved], axis=-1)
    back = _rolled(upstream, [-offset for offset in offsets])
    return sum(distribution[..., index : index + 1] * values for index, values in enumerate(back)), shares


def _rolled(weighting, offsets):
    """The weighting moved by each of the offsets, around the end."""
    slots = weighting.shape[-1]
    forward, back = max(0, *offsets), max(0, *(-offset for offset in offsets))
    ring = ops.concatenate([weighting[..., slots - forward :], weighting, weighting[..., :back]], axis=-1)
    return [ring[..., forward - offset : forward - offset + slots] for offset in offsets]


def _softmax(logits):
    """Over the last axis.

    XLA makes one kernel of a sum (or maximum) over slots and the arithmetic that follows, and that kernel goes row by
    row, at several times the cost. A select or a division in between, as here, keeps the two apart.
    """
    greatest = ops.max(logits, axis=-1, keepdims=True)
    powers = ops.exp(logits - ops.where(ops.isfinite(greatest), greatest, 0.0))
    total = _total(powers)
    return _Softmax(powers * ops.reciprocal(total), powers, total)


def _softmax_gradient(softmax, upstream):
    return softmax.values * (upstream - _total(softmax.powers * upstream) / softmax.total)


def _over_slots(matrix, rows):
    """Sums over slots: of ``[batch, depth, slots]`` and ``[batch, heads, slots]`` to ``[batch, heads, depth]``.

    One head at a time: for several at once, XLA transposes the memory instead of them.
    """
    return _joined([_turned(matrix @ _turned(rows[:, head : head + 1])) for head in range(rows.shape[1])])


def _parted(weightings, read_heads):
    return weightings[:, :read_heads], weightings[:, read_heads:]


def _joined(parts):
    return parts[0] if len(parts) == 1 else ops.concatenate(parts, axis=1)


def _product(factors):
    product = factors[0]
    for factor in factors[1:]:
        product = product * factor
    return product


def _total(values):
    return ops.sum(values, axis=-1, keepdims=True)


def _turned(values):
    return ops.transpose(values, (0, 2, 1))
