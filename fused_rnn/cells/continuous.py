"""Cells that are a step of a differential equation."""

from typing import Any

import torch
from torch import Tensor

from fused_rnn.cells.definition import cell

ALPHA = 0.2  # of the leaky RNN: the step over the time constant
EPSILON, GAMMA = 0.1, 0.01  # of the antisymmetric RNN: the step, and the diffusion


@cell(gates="a", states="h")
def leaky_rnn(gates: Any, state: Any) -> Tensor:
    """A unit that leaks: Euler's step of tau dh/dt = -h + tanh(a), with alpha = dt / tau = 0.2.

        h' = (1 - alpha) h + alpha tanh(a)

    alpha is a constant; a cell with another one takes the same two lines, see docs/cells.md.

    H. Jaeger, M. Lukosevicius, D. Popovici, U. Siewert, "Optimization and applications of echo
    state networks with leaky-integrator neurons", Neural Networks 20, 2007.
    """
    return torch.lerp(state.h, torch.tanh(gates.a), ALPHA)


@cell(gates="a", states="h", parameters={"rate": -1.4})
def learned_leaky_rnn(gates: Any, state: Any, p: Any) -> Tensor:
    """A leaky RNN each of whose units learns its time constant, at first about 5 steps.

        h' = (1 - alpha) h + alpha tanh(a), alpha = sigmoid(rate) = 1 / tau

    S. C. Quax, M. D'Asaro, M. A. J. van Gerven, "Adaptive time scales in recurrent neural
    networks", Scientific Reports 10, 2020.
    """
    return torch.lerp(state.h, torch.tanh(gates.a), torch.sigmoid(p.rate))


@cell(gates="a", states="h")
def antisymmetric_rnn(gates: Any, state: Any) -> Tensor:
    """Euler's step of a stable equation, which neither forgets nor explodes.

        h' = h + epsilon tanh(a - gamma h), epsilon = 0.1, gamma = 0.01

    It is stable if the recurrent weights are antisymmetric, which is no matter of the cell but of
    a parametrization of ``weight_hh_l0``: docs/cells.md has it.

    B. Chang, M. Chen, E. Haber, E. H. Chi, "AntisymmetricRNN: A dynamical system view on recurrent
    neural networks", ICLR 2019, arXiv:1902.09689.
    """
    return torch.add(state.h, torch.tanh(gates.a - GAMMA * state.h), alpha=EPSILON)


@cell(gates=("ff1", "ff2", "time_a", "time_b"), states="h")
def cfc(gates: Any, state: Any) -> Tensor:
    """The closed form of a liquid time-constant network, without a backbone, at steps of time 1.

        h' = (1 - s) tanh(ff1) + s tanh(ff2), s = sigmoid(time_a + time_b)

    R. Hasani, M. Lechner, A. Amini, L. Liebenwein, A. Ray, M. Tschaikowski, G. Teschl, D. Rus,
    "Closed-form continuous-time neural networks", Nature Machine Intelligence 4, 2022.
    """
    s = torch.sigmoid(gates.time_a + gates.time_b)
    return torch.lerp(torch.tanh(gates.ff1), torch.tanh(gates.ff2), s)
