"""What a controller has to say at each step: the one table of head parameters, and how it is cut apart."""

from typing import NamedTuple

import keras
from keras import ops

from ntm.float64 import tanh


class Parameter(NamedTuple):
    """One row of the table: a parameter that each of ``heads`` heads takes ``size`` values of."""

    name: str
    heads: int
    size: int
    activation: str

    @property
    def width(self):
        """Values of all heads together."""
        return self.heads * self.size


ACTIVATIONS = {
    "tanh": tanh,
    "sigmoid": keras.activations.sigmoid,
    "softplus": keras.activations.softplus,
    "one_plus_softplus": lambda x: 1.0 + keras.activations.softplus(x),
    "softmax": lambda x: ops.softmax(x, axis=-1),
}


def head_parameters(m_depth, shift_range, read_heads, write_heads):
    """The table, in the order in which the values follow each other. Read heads stand before write heads.

    Args:
        m_depth: the width of a slot.
        shift_range: how many shifts a head chooses from.
        read_heads: at least 1.
        write_heads: at least 1.

    Returns:
        A tuple of `Parameter`.
    """
    heads = read_heads + write_heads
    return (
        #         name        heads        size         activation           symbol in the paper
        Parameter("key", heads, m_depth, "tanh"),  # .                       k
        Parameter("strength", heads, 1, "softplus"),  # .                    beta
        Parameter("gate", heads, 1, "sigmoid"),  # .                         g
        Parameter("shifts", heads, shift_range, "softmax"),  # .             s
        Parameter("gamma", heads, 1, "one_plus_softplus"),  # .              gamma
        Parameter("erase", write_heads, m_depth, "sigmoid"),  # .            e
        Parameter("add", write_heads, m_depth, "tanh"),  # .                 a
    )


def width(table):
    """How many values the table takes."""
    return sum(parameter.width for parameter in table)


def split(values, table):
    """Cuts a vector of raw values into head parameters, and brings each into its range.

    Args:
        values: ``[batch, width(table)]``.
        table: as `head_parameters` returns it.

    Returns:
        A dict from name to ``[batch, heads, size]``.
    """
    parts, start = {}, 0
    for parameter in table:
        part = values[:, start : start + parameter.width]
        part = ops.reshape(part, (-1, parameter.heads, parameter.size))
        parts[parameter.name] = ACTIVATIONS[parameter.activation](part)
        start += parameter.width
    return parts


def controller_input_output_shape(input_dim, output_dim, m_depth, n_slots, shift_range, read_heads=1, write_heads=1):
    """The widths that a controller which speaks for the heads itself must have.

    Args:
        input_dim: values in one input step.
        output_dim: values in one output step.
        m_depth: the width of a slot.
        n_slots: slots; they do not enter the result, and stand here for those who call by position.
        shift_range: how many shifts a head chooses from.
        read_heads: at least 1.
        write_heads: at least 1.

    Returns:
        ``(input width, output width)``: a step's input beside the last read vectors, and a step's output before the
        head parameters.
    """
    del n_slots
    table = head_parameters(m_depth, shift_range, read_heads, write_heads)
    return input_dim + read_heads * m_depth, output_dim + width(table)
