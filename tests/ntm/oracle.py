"""The paper in plain loops over Python floats, one number at a time: what the layer is held to.

Where it clamps, as the layer does and the paper does not: 1e-12 is added to squared norms, and a weighting counts as at
least 1e-16 when it is sharpened. Heads address the memory as the step before left it; all erases come before all adds;
reads see the written memory.
"""

import math
from itertools import chain


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def softplus(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def softmax(values):
    top = max(values)
    powers = [math.exp(value - top) for value in values]
    return [power / sum(powers) for power in powers]


def cosine(key, slot):
    dot = sum(a * b for a, b in zip(key, slot, strict=True))
    return dot / math.sqrt(sum(a * a for a in key) + 1e-12) / math.sqrt(sum(b * b for b in slot) + 1e-12)


def shift(weighting, distribution):
    """Weight moves forward by -1, 0, +1 for three entries, by -1, 0, +1, +2 for four."""
    slots, first = len(weighting), -((len(distribution) - 1) // 2)
    moved = [0.0] * slots
    for source in range(slots):
        for position, share in enumerate(distribution):
            moved[(source + first + position) % slots] += share * weighting[source]
    return moved


def sharpen(weighting, gamma):
    powers = [max(weight, 1e-16) ** gamma for weight in weighting]
    return [power / sum(powers) for power in powers]


def address(memory, previous, key, strength, gate, shifts, gamma):
    content = softmax([strength * cosine(key, slot) for slot in memory])
    gated = [gate * c + (1 - gate) * p for c, p in zip(content, previous, strict=True)]
    return sharpen(shift(gated, shifts), gamma)


def read(memory, weighting):
    return [sum(w * slot[place] for w, slot in zip(weighting, memory, strict=True)) for place in range(len(memory[0]))]


def write(memory, weightings, erases, adds):
    new = [list(slot) for slot in memory]
    for weighting, erase in zip(weightings, erases, strict=True):
        for i, slot in enumerate(new):
            for place in range(len(slot)):
                slot[place] *= 1 - weighting[i] * erase[place]
    for weighting, add in zip(weightings, adds, strict=True):
        for i, slot in enumerate(new):
            for place in range(len(slot)):
                slot[place] += weighting[i] * add[place]
    return new


def split(raw, depth, shift_range, read_heads, write_heads):
    """Raw head parameters to one dict a head, read heads first."""
    values, count = iter(min(max(value, -20.0), 20.0) for value in raw), read_heads + write_heads
    take = lambda size: [next(values) for _ in range(size)]  # noqa: E731 - a reader's cursor, four lines long
    keys = [[math.tanh(x) for x in take(depth)] for _ in range(count)]
    strengths = [softplus(take(1)[0]) for _ in range(count)]
    gates = [sigmoid(take(1)[0]) for _ in range(count)]
    shifts = [softmax(take(shift_range)) for _ in range(count)]
    gammas = [1 + softplus(take(1)[0]) for _ in range(count)]
    erases = [[sigmoid(x) for x in take(depth)] for _ in range(write_heads)]
    adds = [[math.tanh(x) for x in take(depth)] for _ in range(write_heads)]
    addressing = list(zip(keys, strengths, gates, shifts, gammas, strict=True))
    assert next(values, None) is None
    return addressing, erases, adds


class Machine:
    """One sequence through the paper's form: tanh controller, projections to head parameters and output."""

    def __init__(self, weights, *, slots, depth, shift_range, read_heads, write_heads):
        self.weights, self.slots, self.depth = weights, slots, depth
        self.shift_range, self.read_heads, self.write_heads = shift_range, read_heads, write_heads

    def linear(self, name, vector):
        kernel, bias = self.weights[name]
        return [b + sum(x * row[out] for x, row in zip(vector, kernel, strict=True)) for out, b in enumerate(bias)]

    def run(self, sequence):
        """Returns the outputs and the final memory, reads and weightings."""
        memory = [[1e-6] * self.depth for _ in range(self.slots)]
        weightings = [softmax(logits) for logits in self.weights["first_weighting_logits"]]
        reads = [read(memory, weighting) for weighting in weightings[: self.read_heads]]
        outputs = []
        for step in sequence:
            hidden = [math.tanh(x) for x in self.linear("controller", [*step, *chain(*reads)])]
            raw = self.linear("parameters", hidden)
            heads, erases, adds = split(raw, self.depth, self.shift_range, self.read_heads, self.write_heads)
            weightings = [address(memory, w, *head) for w, head in zip(weightings, heads, strict=True)]
            memory = write(memory, weightings[self.read_heads :], erases, adds)
            reads = [read(memory, weighting) for weighting in weightings[: self.read_heads]]
            outputs.append([sigmoid(x) for x in self.linear("output", [*hidden, *chain(*reads)])])
        return outputs, memory, reads, weightings
