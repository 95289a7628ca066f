"""What the tasks ask for, read off one sequence's inputs with plain loops over Python lists."""

import math


def bits_of(row, width):
    return [int(value) for value in row[:width]]


def flags(inputs, channel):
    """The steps at which a channel is up."""
    return [step for step, row in enumerate(inputs) if row[channel] == 1.0]


def repeat_copy(inputs, bits, repeats):
    """The outputs asked for, as (step, values), of a sequence that is to be given back ``repeats`` times."""
    (start,), (end,) = flags(inputs, bits), flags(inputs, bits + 1)
    vectors = [bits_of(inputs[step], bits) for step in range(start + 1, end)]
    asked, step = [], end + 1
    for _ in range(repeats):
        for vector in vectors:
            asked.append((step, [*vector, 0]))
            step += 1
    asked.append((step, [0] * bits + [1]))
    return asked


def associative_recall(inputs, bits):
    """The outputs asked for, as (step, values)."""
    items, query = [], None
    first_query, last_query = flags(inputs, bits + 1)
    for step, row in enumerate(inputs):
        if row[bits] == 1.0:
            items.append([])
        elif step < first_query:
            items[-1].append(bits_of(row, bits))
        elif first_query < step < last_query:
            query = [*(query or []), bits_of(row, bits)]
    answer = items[items.index(query) + 1]
    return [(last_query + 1 + offset, vector) for offset, vector in enumerate(answer)]


def priority_sort(inputs, bits, returned):
    """The outputs asked for, as (step, values)."""
    (start,), (end,) = flags(inputs, bits + 1), flags(inputs, bits + 2)
    pairs = [(float(inputs[step][bits]), bits_of(inputs[step], bits)) for step in range(start + 1, end)]
    asked = []
    for offset in range(returned):
        best = max(pairs, key=lambda pair: pair[0])
        pairs.remove(best)
        asked.append((end + 1 + offset, best[1]))
    return asked


def ngrams_loss(bits, context, first):
    """Bits that the optimal predictor loses on a sequence, from the target number ``first`` on."""
    counts, loss = {}, 0.0
    for position in range(context, len(bits)):
        key = tuple(bits[position - context : position])
        zeros, ones = counts.setdefault(key, [0, 0])
        chance = (ones + 0.5) / (zeros + ones + 1)
        if position >= first:
            loss -= math.log2(chance if bits[position] else 1 - chance)
        counts[key][bits[position]] += 1
    return loss
