"""A Neural Turing Machine (Graves et al. 2014, https://arxiv.org/abs/1410.5401) as a Keras 3 layer, on any backend."""

from ntm.cell import NTMCell
from ntm.layer import NeuralTuringMachine
from ntm.loading import load
from ntm.parameters import controller_input_output_shape
from ntm.plotting import plot_trace
from ntm.tracing import Trace, trace

__all__ = ["NeuralTuringMachine", "NTMCell", "controller_input_output_shape", "load", "trace", "plot_trace", "Trace"]
