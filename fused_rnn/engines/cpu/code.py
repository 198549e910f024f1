"""A derivation as functions of PyTorch calls: as few as possible for a time step, and in place.

A call takes some microseconds, which is what counts at these sizes. So the slots of the gate buffer
are put in an order in which what enters a product or an activation, or is multiplied by the same
gradient, lies side by side and takes one call.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from fused_rnn.derive.derivation import Derivation, derivation
from fused_rnn.derive.source import load
from fused_rnn.engines.cpu import texts
from fused_rnn.engines.cpu.texts import Parts
from fused_rnn.spec.cells import Cell

MOST_PERMUTED = 5  # slots that share input and recurrent part: all their orders are looked at


@dataclass(frozen=True, eq=False)
class Code:
    """What the sweeps of a cell call.

    Attributes:
        slots: of a unit in the gate buffer: input parts of gates whose parts are apart, then the
            slots of both parts, then the recurrent parts.
        x_gates: the gate of each slot that the input enters: the first ones.
        h_gates: the gate of each slot that the recurrent product enters: the last ones.
        keeps_slots: whether backward needs the gate buffer; if not, its one slot is h.
        needs_h: whether the factors need h before a step.
        activations: (first slot, end, name): slots that a step activates together.
        products: (first slot, end): slots of the reverse sweep that are multiplied together.
        apart: slots of the reverse sweep that are no such product, nor zero.
        factors: tensors that ``coefficients`` returns.
        step: see :func:`fused_rnn.engines.cpu.texts.step_text`; returns h [n, H].
        rebuild: see :func:`fused_rnn.engines.cpu.texts.rebuild_text`.
        coefficients: see :func:`fused_rnn.engines.cpu.texts.coefficients_text`.
        adjoint: see :func:`fused_rnn.engines.cpu.texts.adjoint_text`.
        hidden: see :func:`fused_rnn.engines.cpu.texts.hidden_text`.
    """

    slots: int
    x_gates: tuple[int, ...]
    h_gates: tuple[int, ...]
    keeps_slots: bool
    needs_h: bool
    activations: tuple[tuple[int, int, str], ...]
    products: tuple[tuple[int, int], ...]
    apart: tuple[int, ...]
    factors: int
    step: Callable[..., Any]
    rebuild: Callable[..., Any]
    coefficients: Callable[..., Any]
    adjoint: Callable[..., Any]
    hidden: Callable[..., Any]


def code_of(cell: Cell, heads: int = 1) -> Code:
    """The functions of a cell whose sweeps can be derived, made once."""
    return _code_of(cell, heads if derivation(cell).mixes_units else 1)


@cache
def _code_of(cell: Cell, heads: int) -> Code:
    d = derivation(cell)
    order = _order(cell, d)
    parts = Parts(d, order)
    text = "\n\n".join(
        [
            texts.step_text(parts),
            texts.rebuild_text(parts),
            texts.coefficients_text(parts),
            texts.adjoint_text(parts),
            texts.hidden_text(parts),
        ]
    )
    made = load(f"{cell.name} on a CPU", text, {"torch": torch, **_layer_norms(heads)})
    gate_of = [g for g, gate in enumerate(cell.gates) for _ in range(1 + (gate in cell.apart))]
    names = [cell.slots[i] for i in order]
    apart = {g + part for g in cell.apart for part in ("_x", "_h")}
    x = [i for i, name in zip(order, names, strict=True) if name not in apart or name[-1] == "x"]
    h = [i for i, name in zip(order, names, strict=True) if name not in apart or name[-1] == "h"]
    return Code(
        slots=len(order),
        x_gates=tuple([gate_of[i] for i in x]),
        h_gates=tuple([gate_of[i] for i in h]),
        keeps_slots=d.keeps_slots,
        needs_h=d.needs_h,
        activations=tuple(parts.activations),
        products=tuple([(a, b) for a, b, _ in parts.products]),
        apart=tuple(parts.apart),
        factors=len(parts.factors),
        **{part: made[part] for part in ("step", "rebuild", "coefficients", "adjoint", "hidden")},
    )


def _order(cell: Cell, d: Derivation) -> tuple[int, ...]:
    """The derivation's slot at each place of the buffer, in the order that takes fewest calls."""
    apart = {g + part for g in cell.apart for part in ("_x", "_h")}
    numbers = range(len(cell.slots))
    first = [i for i in numbers if cell.slots[i] in apart and cell.slots[i].endswith("_x")]
    last = [i for i in numbers if cell.slots[i] in apart and cell.slots[i].endswith("_h")]
    shared = [i for i in numbers if cell.slots[i] not in apart]
    if len(shared) > MOST_PERMUTED:
        return (*first, *shared, *last)

    def calls(order: tuple[int, ...]) -> int:
        parts = Parts(d, order)
        return len(parts.activations) + len(parts.products)

    return min([(*first, *some, *last) for some in permutations(shared)], key=calls)


def _layer_norms(heads: int) -> dict[str, Callable[..., Tensor]]:
    """What is computed of all units of a head, in tensors [n, H] of heads side by side."""
    backward = torch.ops.aten.native_layer_norm_backward.default

    def apart(x: Tensor) -> Tensor:
        return x if heads == 1 else x.unflatten(-1, (heads, -1))

    def layer_norm(
        x: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """(x - mean) rstd; times weight plus bias [H], if there are any."""
        if heads == 1:
            return torch.layer_norm(x, x.shape[-1:], weight, bias, eps)
        parts = apart(x)
        y = torch.layer_norm(parts, parts.shape[-1:], None, None, eps).view(x.shape)
        return y if weight is None or bias is None else torch.addcmul(bias, y, weight)

    def layer_rstd(x: Tensor, eps: float) -> Tensor:
        """1 / sqrt(variance + eps)."""
        parts = apart(x)
        variance = parts.var(-1, correction=0, keepdim=True)
        rstd = torch.rsqrt(variance + eps).expand_as(parts)
        return rstd.contiguous().view(x.shape)  # others may be written into it

    def layer_center(d: Tensor, y: Tensor) -> Tensor:
        """The gradient of x over rstd, of the gradient d of y: PyTorch's own, were rstd 1."""
        dy, parts = apart(d), apart(y.expand_as(d))  # y of parameters is [H]
        mean = dy.new_zeros(*dy.shape[:-1], 1)
        rest = (parts.shape[-1:], mean, torch.ones_like(mean), None, None, [True, False, False])
        centered: Tensor = backward(dy, parts, *rest)[0]
        return centered.view(d.shape)

    return {f.__name__: f for f in (layer_norm, layer_rstd, layer_center)}
