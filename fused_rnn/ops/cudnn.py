"""A whole stack of layers by cuDNN: one call of PyTorch's in each pass, as torch.nn makes it.

At the sizes for which cuDNN is the faster one, what a layer spends on the host beside that call is
most of its time. So there is nothing beside it, not even an autograd function.
"""

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_rnn.engines import native, reference
from fused_rnn.spec.batch import BatchLayout
from fused_rnn.spec.cells import Cell
from fused_rnn.spec.layer import LayerInputs, LayerSpec, Weights
from fused_rnn.spec.precision import without_autocast


class Stack(NamedTuple):
    """What is called, beside its tensors.

    Attributes:
        cell: the cell, which PyTorch has.
        hidden_size: H.
        proj_size: R, or 0.
        num_layers: L.
        bidirectional: whether there are two directions.
        batch_first: whether x is [B, T, I]; not of a packed batch.
        layout: where the rows of each time step lie, were they in order of time.
        packed: whether x is such rows [N, I].
    """

    cell: Cell
    hidden_size: int
    proj_size: int
    num_layers: int
    bidirectional: bool
    batch_first: bool
    layout: BatchLayout = BatchLayout(1, 1)
    packed: bool = False

    def arguments(self, train: bool) -> tuple[Any, ...]:
        """Those of cuDNN between the states and the memory of its dropout, which stays away."""
        functions = self.cell.torch
        assert functions is not None
        sizes: list[int] = []
        if self.packed:
            sizes = list(self.layout.batch_sizes or [self.layout.B] * self.layout.T)
        how = (functions.cudnn_mode, self.hidden_size, self.proj_size, self.num_layers)
        return *how, self.batch_first, 0.0, train, self.bidirectional, sizes

    def per_direction(self, weights: Sequence[Any]) -> int:
        """How many of the parameters one direction of a layer has."""
        return len(weights) // (self.num_layers * (1 + self.bidirectional))


def flatten(stack: Stack, input_size: int, weights: list[Any]) -> tuple[Tensor, list[int]] | None:
    """Move the weights into one piece of memory, in cuDNN's order.

    Returns:
        that memory and where in it each weight is; None where cuDNN could not use it, nor torch.nn
        would make it: off a GPU, in another type, or if tensors differ in kind or are the same.
    """
    first = weights[0]
    if not (first.is_cuda and native.cudnn() and torch.cudnn_is_acceptable(first)):
        return None
    alike = all([p.dtype is first.dtype and p.device == first.device for p in weights])
    if not alike or len({p.data_ptr() for p in weights}) < len(weights):
        return None
    return in_memory(stack, input_size, weights), [p.data_ptr() for p in weights]


def in_memory(stack: Stack, input_size: int, weights: list[Any]) -> Tensor:
    """The piece of memory to which the weights were moved."""
    mode, H, R, layers, batch_first, _, _, two, _ = stack.arguments(False)
    how = stack.per_direction(weights), input_size, mode, H, R, layers, batch_first, two
    return native.in_one_piece(weights, *how)


def run(
    stack: Stack,
    x: Tensor,
    states: tuple[Tensor, ...],
    weights: list[Tensor],
    flat: Tensor | None,
    record: bool,
) -> tuple[Tensor, ...]:
    """``out`` and the final states; autograd records the call itself, as that of torch.nn.

    Args:
        stack: what is called.
        x: [T, B, I], [B, T, I] or rows [N, I].
        states: h0 and c0, or h0 alone, [L*D, B, .].
        weights: the parameters in torch.nn's order.
        flat: the memory in which :func:`flatten` put them; None if they are elsewhere.
        record: whether a gradient may be asked for.
    """
    if flat is None:
        flat = in_memory(stack, x.shape[-1], [w.detach() for w in weights])
        weights = [w.contiguous() for w in weights]
    h0 = states[0].contiguous()
    c0 = states[1].contiguous() if len(states) == 2 else None
    arguments: Any = (stack.per_direction(weights), flat, h0, c0, *stack.arguments(record), None)
    out, h_n, c_n, *_ = torch._cudnn_rnn(x, weights, *arguments)
    if record:
        # No strong ones: autograd keeps them as long as it may need them, and no longer.
        inputs = [None if t is None else weakref.ref(t) for t in (x, *weights, h0, c0)]
        node: Any = out.grad_fn
        node.register_hook(partial(_differentiable, stack, inputs))
    return (out, h_n) if c0 is None else (out, h_n, c_n)


def _differentiable(
    stack: Stack, inputs: list[Any], found: tuple[Tensor | None, ...], grads: tuple[Any, ...]
) -> tuple[Tensor | None, ...] | None:
    """In the place of cuDNN's gradients, which cannot be differentiated, those of the eager loop.

    Autograd calls it after each pass back through the call.

    Args:
        stack: what was called.
        inputs: references to x, the weights, h0 and c0, in autograd's order.
        found: their gradients by cuDNN; a c0 that is not there may be left out.
        grads: those of the outputs.

    Raises:
        RuntimeError: an input is gone.
    """
    if not torch.is_grad_enabled():  # create_graph is not asked for
        return None
    tensors = [None if r is None else r() for r in inputs]
    if any(r is not None and t is None for r, t in zip(inputs, tensors, strict=True)):
        raise RuntimeError("what cuDNN was called with is gone: its graph was freed")
    views: list[Any] = [None if t is None else t.view_as(t) for t in tensors]
    x, *weights, h0, c0 = views
    with without_autocast(x.device):  # in which backward may have been called
        outputs = by_the_loop(stack, x, h0, c0, *weights)
    views = views[: len(found)]
    wanted = [g is not None and v.requires_grad for v, g in zip(views, found, strict=True)]
    # cuDNN has more outputs, without gradients.
    return reference.gradients(outputs, grads[:3], views, wanted, create_graph=True)


def by_the_loop(
    stack: Stack, x: Tensor, h0: Tensor, c0: Tensor | None, *weights: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``out, h_n, c_n`` of the same by the eager loop, layer after layer."""
    layout, D = stack.layout, 1 + stack.bidirectional
    rows = x
    if not stack.packed:
        rows = (x.transpose(0, 1) if stack.batch_first else x).flatten(0, 1)
    each = stack.per_direction(weights)
    spec = LayerSpec(stack.cell, layout, D, stack.hidden_size, projected=stack.proj_size > 0)
    finals = []
    for first in range(0, stack.num_layers * D, D):
        mine = [weights[n * each : (n + 1) * each] for n in range(first, first + D)]
        states = h0[first : first + D], None if c0 is None else c0[first : first + D]
        inputs = LayerInputs(rows, *states, tuple([_of_direction(w, spec) for w in mine]))
        outputs = reference.run(spec, inputs)
        rows = outputs.out
        finals.append((outputs.h_n, outputs.c_n))
    h_n = torch.cat([h for h, _ in finals])
    c_n = None if c0 is None else torch.cat([c for _, c in finals if c is not None])
    if stack.packed:
        return rows, h_n, c_n
    out = rows.unflatten(0, (layout.T, layout.B))
    return out.transpose(0, 1) if stack.batch_first else out, h_n, c_n


def _of_direction(weights: tuple[Tensor, ...], spec: LayerSpec) -> Weights:
    """Torch.nn's order: both matrices, both biases if there are any, a projection if there is."""
    w_hr = weights[-1] if spec.projected else None
    b_ih, b_hh = weights[2:4] if len(weights) >= 4 else (None, None)
    return Weights(weights[0], weights[1], b_ih, b_hh, w_hr)
