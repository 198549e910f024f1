"""The eager loop as an engine, for callers who cannot leave differentiation to autograd."""

import torch
from torch import Tensor

from fused_rnn import reference, transforms
from fused_rnn.problem import Grads, Layer, OutputGrads, Outputs, Saved, Specs


def forward(layer: Layer, inputs: Saved, save: bool) -> tuple[Outputs, Saved]:
    """See :class:`fused_rnn.problem.Engine`."""
    with torch.no_grad():
        return reference.run(layer, inputs), ()


def saved_specs(layer: Layer, inputs: Saved) -> Specs:
    """See :class:`fused_rnn.problem.Engine`."""
    return ()


def backward(
    layer: Layer,
    inputs: Saved,
    out: Tensor,
    saved: Saved,
    grads: OutputGrads,
    needs: tuple[bool, ...],
) -> Grads:
    """See :class:`fused_rnn.problem.Engine`."""
    return transforms.vjp(layer, inputs, grads, needs)
