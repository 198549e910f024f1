"""What would run for a layer and an input, and why."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fused_rnn.base import FusedRNNBase
from fused_rnn.dispatch import choose
from fused_rnn.precision import autocast_dtype
from fused_rnn.problem import Layer
from fused_rnn.rows import Rows


@dataclass(frozen=True)
class Explanation:
    """What runs one layer of a stack.

    Attributes:
        layer: its number, from 0 at the input.
        backend: "triton", "cpu" or "eager".
        reason: why, and for Triton by what plan.
    """

    layer: int
    backend: str
    reason: str

    def __str__(self) -> str:
        return f"layer {self.layer}: {self.backend}: {self.reason}"


class Explanations(tuple[Explanation, ...]):
    """One :class:`Explanation` for each layer; prints one line for each."""

    def __str__(self) -> str:
        return "\n".join(map(str, self))


def explain(layer: FusedRNNBase, x: Tensor | PackedSequence) -> Explanations:
    """Tell which backend would run ``layer`` on ``x``, and why. Nothing is computed.

    Args:
        layer: a fused layer.
        x: an input that it accepts.

    Raises:
        TypeError: ``layer`` is not a fused layer.
        ValueError: ``x`` does not fit the layer, as in a call; so RuntimeError.
    """
    if not isinstance(layer, FusedRNNBase):
        raise TypeError(f"explain takes a fused layer, got {type(layer).__name__}")
    if isinstance(x, PackedSequence):
        layer.check_input(x.data, x.batch_sizes)
        rows, data = Rows.packed(x.batch_sizes), x.data
    else:
        batch_dim = 0 if layer.batch_first else 1
        data = x.unsqueeze(batch_dim) if x.dim() == 2 else x
        layer.check_input(data, None)
        rows = Rows(data.shape[1 - batch_dim], data.shape[batch_dim])
    dtype = autocast_dtype(data) or data.dtype
    record = torch.is_grad_enabled()
    record = record and (data.requires_grad or any(p.requires_grad for p in layer.parameters()))
    problem = Layer(layer._cell, rows, layer._directions, layer.recompute)
    choice = choose(
        problem, data.device, dtype, layer.hidden_size, layer.proj_size > 0, layer.backend, record
    )
    return Explanations(
        Explanation(number, choice.backend, choice.reason) for number in range(layer.num_layers)
    )
