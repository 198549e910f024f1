"""A cell of one's own, in one file: the minimal gated unit.

    f = sigmoid(W_if x + b_if + W_hf h + b_hf)
    n = tanh(W_in x + b_in + f * (W_hn h + b_hn))
    h' = (1 - f) * h + f * n

G.-B. Zhou, J. Wu, C.-L. Zhang, Z.-H. Zhou, "Minimal gated unit for recurrent neural networks",
International Journal of Automation and Computing 13, 2016. There f multiplies h before the
recurrent product, which would make two dependent products of a step; here it acts after, as the
reset gate of torch.nn's GRU does, so that one product serves both gates.

docs/adding_a_cell.md explains this file. It is a module to import, which registers the cell.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fused_rnn.engines.cells import register
from fused_rnn.kernels.cell import CellFunctions, KernelCell
from fused_rnn.kernels.tiles import sigmoid, tanh
from fused_rnn.layers.base import FusedRNNBase
from fused_rnn.spec.cells import Cell, State

# ---- what the cell is: the eager loop runs this, and every faster backend is tested against it ---


def _step(gx: Tensor, gh: Tensor, state: State) -> State:
    xf, xn = gx.chunk(2, dim=-1)
    hf, hn = gh.chunk(2, dim=-1)
    f = torch.sigmoid(xf + hf)
    n = torch.tanh(xn + f * hn)
    return (1 - f) * state[0] + f * n, None


# ---- the same for the kernels: a step, and its adjoint as factors times gradients ----------------
# Slots: 0 is f, 1 is unused, 2 is the input part of n, 3 is its recurrent part q = W_hn h + b_hn.


@triton.jit
def mgu_step(pre, state, params, FAST: tl.constexpr):
    """What is saved, and the new state."""
    f = sigmoid(pre[0], FAST)
    n = tanh(pre[2] + f * pre[3], FAST)
    return (f, f, n, pre[3]), (state[0] + f * (n - state[0]),)


@triton.jit
def mgu_factors(saved, now, before, params, FAST: tl.constexpr):
    """The derivatives of h' by the pre-activations in slots 0, 2 and 3, and by h itself."""
    f = saved[0]
    n = saved[2]
    dn = f * (1.0 - n * n)
    df = (n - before[0] + dn * saved[3]) * f * (1.0 - f)
    return df, dn, dn * f, 1.0 - f


@triton.jit
def mgu_adjoint(k, grads, none):
    """Gradients of the slots, what reaches the h before past the product, and no parameters."""
    dh = grads[0]
    return (dh * k[0], none, dh * k[1], dh * k[2]), (dh * k[3],), ()


FUNCTIONS = CellFunctions(mgu_step, mgu_factors, mgu_adjoint)


def _activate(gates: Tensor, before: Sequence[Tensor], vectors: Tensor | None) -> None:
    gates[..., 0].sigmoid_()
    gates[..., 2].addcmul_(gates[..., 0], gates[..., 3]).tanh_()


MGU = Cell(
    "mgu",
    gates=2,
    has_c=False,
    step=_step,
    kernels=KernelCell(
        "mgu",
        states=1,
        x_slots=(0, 2),
        h_slots=(0, 3),
        functions=lambda: FUNCTIONS,
        activate=_activate,
        factors=4,
    ),
)
register(MGU)

# ---- the layer -----------------------------------------------------------------------------------


class FusedMGU(FusedRNNBase):
    """A layer of minimal gated units. Arguments, inputs and outputs are those of ``nn.GRU``.

    Example:
        >>> mgu = FusedMGU(10, 20, bidirectional=True)
        >>> output, h_n = mgu(torch.randn(5, 3, 10))
        >>> output.shape, h_n.shape, mgu.weight_hh_l0.shape
        (torch.Size([5, 3, 40]), torch.Size([2, 3, 20]), torch.Size([40, 20]))
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM")
        super().__init__("MGU", *args, **kwargs)

    @property
    def _cell(self) -> Cell:
        return MGU

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """``output`` [T, B, D*H] and ``h_n`` [L*D, B, H]."""
        output, (h_n,) = self._run(input, None if hx is None else (hx,))
        return output, h_n
