"""A whole stack of layers by cuDNN: one call of PyTorch's in each pass, as torch.nn makes it.

At the sizes for which cuDNN is the faster one, what a layer spends on the host beside that call is
most of its time. So all layers are one autograd function, which does nothing else.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_rnn.engines import native, reference
from fused_rnn.spec.batch import BatchLayout
from fused_rnn.spec.cells import Cell
from fused_rnn.spec.context import forward_mode, vectorised
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
    layout: BatchLayout
    packed: bool

    def arguments(self, train: bool) -> tuple[Any, ...]:
        """Those of cuDNN between the states and the memory of its dropout, which stays away."""
        functions = self.cell.torch
        assert functions is not None
        sizes = list(self.layout.batch_sizes or [self.layout.B] * self.layout.T)
        how = (functions.cudnn_mode, self.hidden_size, self.proj_size, self.num_layers)
        return *how, self.batch_first, 0.0, train, self.bidirectional, sizes if self.packed else []


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
    mode, H, R, layers, batch_first, _, _, two, _ = stack.arguments(False)
    each = len(weights) // (layers * (1 + two))
    with torch.no_grad(), torch.cuda.device_of(first):
        how = (each, input_size, mode, H, R, layers, batch_first, two)
        memory = torch._cudnn_rnn_flatten_weight(weights, *how)
    return memory, [p.data_ptr() for p in weights]


def run(
    stack: Stack,
    x: Tensor,
    states: tuple[Tensor, ...],
    weights: list[Tensor],
    flat: Tensor | None,
    record: bool,
) -> tuple[Tensor, ...]:
    """``out`` and the final states.

    Args:
        stack: what is called.
        x: [T, B, I], [B, T, I] or rows [N, I].
        states: h0 and c0, or h0 alone, [L*D, B, .].
        weights: the parameters in torch.nn's order.
        flat: the memory in which :func:`flatten` put them; None lets cuDNN copy them.
        record: whether a gradient may be asked for.
    """
    h0, c0 = states if len(states) == 2 else (states[0], None)
    if record:
        out, h_n, c_n = StackFunction.apply(stack, flat, x, h0, c0, *weights)
    else:
        out, h_n, c_n, *_ = _forward(stack, flat, x, h0, c0, weights, train=False)
    return (out, h_n) if c0 is None else (out, h_n, c_n)


def _forward(
    stack: Stack,
    flat: Tensor | None,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Any,
    train: bool,
) -> Any:
    each = len(weights) // (stack.num_layers * (1 + stack.bidirectional))
    if flat is None:
        weights = [w.contiguous() for w in weights]
    c0 = None if c0 is None else c0.contiguous()
    arguments: Any = (each, flat, h0.contiguous(), c0, *stack.arguments(train), None)
    return torch._cudnn_rnn(x, weights, *arguments)


class StackFunction(torch.autograd.Function):
    """``apply(stack, flat, x, h0, c0, *weights)`` returns ``out, h_n, c_n``."""

    @staticmethod
    def forward(
        ctx: Any,
        stack: Stack,
        flat: Tensor | None,
        x: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Call cuDNN, and keep what its backward asks for."""
        out, h_n, c_n, reserve, flat = _forward(stack, flat, x, h0, c0, weights, train=True)
        ctx.stack = stack
        ctx.set_materialize_grads(False)
        # Of the outputs only the first: the caller may overwrite the others.
        ctx.save_for_backward(x, h0, c0, out, reserve, flat, *weights)
        return out, h_n, None if c0 is None else c_n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of all inputs; differentiable themselves under ``create_graph=True``."""
        needs = ctx.needs_input_grad[2:]
        if all(g is None for g in grads):
            return (None,) * (2 + len(needs))
        x, h0, c0, out, reserve, flat, *weights = ctx.saved_tensors
        with without_autocast(x.device):  # in which backward may have been called
            if torch.is_grad_enabled() or forward_mode() or vectorised():
                found = _differentiable(ctx.stack, (x, h0, c0, *weights), grads, needs)
                return None, None, *found
            each = len(weights) // (ctx.stack.num_layers * (1 + ctx.stack.bidirectional))
            states = h0.contiguous(), None if c0 is None else c0.contiguous()
            mask = [*needs[:2], c0 is not None and needs[2], any(needs[3:])]
            # cuDNN writes into what it has kept, and backward may be called again.
            rest = *ctx.stack.arguments(True), None, reserve.clone(), mask
            backward = torch.ops.aten._cudnn_rnn_backward
            dx, dh0, dc0, dw = backward(x, weights, each, flat, *states, out, *grads, *rest)
        found = [dx, dh0, dc0, *(dw or [None] * len(weights))]
        return None, None, *[g if need else None for g, need in zip(found, needs, strict=True)]


def _differentiable(
    stack: Stack,
    inputs: tuple[Tensor | None, ...],
    grads: tuple[Tensor | None, ...],
    needs: tuple[bool, ...],
) -> list[Tensor | None]:
    """The gradients by autograd of the eager loop: cuDNN's own cannot be differentiated."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # An own node for each input: one tensor may stand in two places (tied weights).
        views = [None if t is None else t.view_as(t) for t in inputs]
        outputs = by_the_loop(stack, *views)  # type: ignore[arg-type]
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o is not None and g is not None]
    wanted = [t for t, need in zip(views, needs, strict=True) if need and t is not None]
    found = iter(
        torch.autograd.grad(
            [o for o, _ in pairs],
            wanted,
            [g for _, g in pairs],
            create_graph=create_graph,
            allow_unused=True,
        )
    )
    return [next(found) if n and t is not None else None for n, t in zip(needs, views, strict=True)]


def by_the_loop(
    stack: Stack, x: Tensor, h0: Tensor, c0: Tensor | None, *weights: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``out, h_n, c_n`` of the same by the eager loop, layer after layer."""
    layout, D = stack.layout, 1 + stack.bidirectional
    rows = x
    if not stack.packed:
        rows = (x.transpose(0, 1) if stack.batch_first else x).flatten(0, 1)
    each = len(weights) // (stack.num_layers * D)
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
