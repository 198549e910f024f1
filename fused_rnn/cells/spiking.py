"""Neurons that spike."""

from typing import Any

from torch import Tensor

from fused_rnn.cells.definition import cell, surrogate

BETA, THRESHOLD, SLOPE = 0.9, 1.0, 10.0  # what is left of v after a step; where, how sharply


@cell(gates="a", states="hv")
def lif(gates: Any, state: Any) -> tuple[Tensor, Tensor]:
    """A leaky integrate-and-fire neuron: h is its spike, 0 or 1, and v its membrane potential.

        v' = beta v + a - threshold h, beta = 0.9
        h' = v' > threshold, threshold = 1

    A spike lowers the potential in the next step. The derivative of a spike is that of the fast
    sigmoid x / (1 + 10 |x|) of x = v' - threshold.

    E. O. Neftci, H. Mostafa, F. Zenke, "Surrogate gradient learning in spiking neural networks",
    IEEE Signal Processing Magazine 36, 2019, arXiv:1901.09948.
    """
    v = BETA * state.v + gates.a - THRESHOLD * state.h
    x = v - THRESHOLD
    return surrogate((x > 0).to(x.dtype), x / (1 + SLOPE * x.abs())), v
