"""A layer under torch.func: vmap, grad, vjp, jvp and what is made of them.

First-order gradients run on the engine. So does vmap where all share the parameters: it is a larger
batch. Everything else, extras too, runs in the eager loop, into which every transform can look.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fused_rnn import autograd, dispatch, reference
from fused_rnn.autograd import forward_mode
from fused_rnn.dispatch import Backend
from fused_rnn.flops import counted
from fused_rnn.precision import without_autocast
from fused_rnn.problem import Grads, Layer, Outputs, Saved
from fused_rnn.rows import Rows


def active() -> bool:
    """Whether a transform of torch.func is at work, or forward-mode differentiation."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def run(layer: Layer, inputs: Saved, backend: Backend) -> Outputs:
    """One layer, be there transforms or not; ``inputs`` as in :class:`fused_rnn.problem.Engine`."""
    if not active():
        return autograd.run(layer, inputs, backend)
    return _run(layer, inputs, backend)


def _run(layer: Layer, inputs: Saved, backend: Backend) -> Outputs:
    """The same under a transform, or under those that are left of some."""
    if not active():
        return autograd.run(layer, inputs, backend, transformed=True)
    if needs_loop(layer) or dispatch.choose_for(layer, inputs, backend).engine is None:
        return reference.run(layer, inputs)
    outputs = _Layer.apply(layer, backend, *inputs)
    return Outputs(outputs[0], outputs[1], outputs[2] if layer.cell.has_c else None)


def needs_loop(layer: Layer) -> bool:
    """Whether a transform that is at work takes the eager loop, whatever the backend."""
    return forward_mode() or torch.compiler.is_compiling() or layer.extras is not None


def vjp(
    layer: Layer, inputs: Saved, grads: Sequence[Tensor | None], needs: Sequence[bool]
) -> Grads:
    """The gradients of :meth:`fused_rnn.problem.Engine.backward`, by the eager loop."""
    given = [i for i, grad in enumerate(grads) if grad is not None]

    def call(*inputs: Tensor | None) -> tuple[Tensor | None, ...]:
        outputs = reference.run(layer, inputs)
        return tuple([outputs[i] for i in given])

    call, wanted = _function_of(call, inputs, needs)
    pull = torch.func.vjp(call, *wanted)[1]
    found = iter(pull(tuple([grads[i] for i in given])))
    return tuple([next(found) if need else None for need in needs])


class _Layer(torch.autograd.Function):
    """``apply(layer, backend, x, h0, c0, *weights)`` returns the outputs that the cell has."""

    @staticmethod
    def forward(layer: Layer, backend: Backend, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        return _present(autograd.run(layer, inputs, backend, transformed=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.layer, ctx.backend, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[2:]
        if all(g is None for g in grads):
            return (None,) * len(ctx.needs_input_grad)
        grads = (*grads, None, None)[:4]
        layer, inputs = ctx.layer, ctx.saved_tensors
        with without_autocast(inputs[0].device):
            if forward_mode():
                return None, None, *vjp(layer, inputs, grads, needs)
            found = iter(_Gradients.apply(layer, ctx.backend, needs, *grads, *inputs))
            return None, None, *(next(found) if need else None for need in needs)

    @staticmethod
    def vmap(
        info: Any, dims: tuple[Any, ...], layer: Layer, backend: Backend, *inputs: Tensor | None
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        dims, V = dims[2:], info.batch_size
        if any(d is not None for d in dims[3:]):
            call = lambda *inputs: _present(reference.run(layer, inputs))  # noqa: E731
            outputs = torch.vmap(call, in_dims=dims)(*inputs)
            return outputs, (0,) * len(outputs)
        # In place of each sequence stand V neighbours, in place of a row V rows of the same step.
        rows, sizes = layer.rows, layer.rows.batch_sizes
        folded = [_fold(t, d, V, at) for t, d, at in zip(inputs, dims, (0, 1, 1), strict=False)]
        wide = Rows(rows.T, rows.B * V, None if sizes is None else tuple([n * V for n in sizes]))
        layer = Layer(layer.cell, wide, layer.directions, layer.recompute)
        out, *states = _present(_run(layer, (*folded, *inputs[3:]), backend))
        states = [s.unflatten(1, (rows.B, V)) for s in states]
        return (out.unflatten(0, (rows.N, V)), *states), (1, *[2] * len(states))


class _Gradients(torch.autograd.Function):
    """``apply(layer, backend, needs, *gradients of the 4 outputs, x, h0, c0, *weights)``.

    Returns the gradients of the inputs that ``needs`` marks.
    """

    @staticmethod
    def forward(
        layer: Layer, backend: Backend, needs: tuple[bool, ...], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        grads, inputs = tensors[:4], tensors[4:]
        engine = dispatch.choose_for(layer, inputs, backend).engine
        assert engine is not None
        engine = counted(engine)
        outputs, saved = engine.forward(layer, inputs, save=True)
        found = engine.backward(layer, inputs, outputs.out, saved, grads, needs)  # type: ignore[arg-type]
        return _distinct(found)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.layer, _, ctx.needs, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[3:]
        call = _gradients(ctx.layer, ctx.needs)
        call, wanted = _function_of(call, ctx.saved_tensors, needs)
        with without_autocast(grads[0].device):
            found = iter(torch.func.vjp(call, *wanted)[1](grads))
        return None, None, None, *(next(found) if need else None for need in needs)

    @staticmethod
    def vmap(
        info: Any,
        dims: tuple[Any, ...],
        layer: Layer,
        backend: Backend,
        needs: tuple[bool, ...],
        *tensors: Tensor | None,
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        found = torch.vmap(_gradients(layer, needs), in_dims=dims[3:])(*tensors)
        return found, (0,) * len(found)


def _gradients(layer: Layer, needs: tuple[bool, ...]) -> Any:
    """What ``_Gradients`` computes of its tensors, by the eager loop."""
    return lambda *tensors: _present(vjp(layer, tensors[4:], tensors[:4], needs))


def _present(tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    return tuple([t for t in tensors if t is not None])


def _distinct(grads: Grads) -> tuple[Tensor, ...]:
    """Those present; a tensor that stands for two (the biases of a direction) is copied."""
    found: list[Tensor] = []
    for grad in _present(grads):
        found.append(grad.clone() if any(grad is other for other in found) else grad)
    return tuple(found)


def _function_of(call: Any, tensors: Sequence[Any], wanted: Sequence[bool]) -> tuple[Any, Any]:
    """``call`` as a function of the ``wanted`` among its arguments, and those.

    As variables of their own: one tensor may stand in two places (tied weights), and the gradient
    of the one must not hold the other's, too.
    """

    def function(*some: Tensor) -> Any:
        left = iter(some)
        return call(*(next(left) if w else t for t, w in zip(tensors, wanted, strict=True)))

    return function, [t for t, w in zip(tensors, wanted, strict=True) if w]


def _fold(tensor: Tensor | None, dim: int | None, V: int, axis: int) -> Tensor | None:
    """Merge the vmapped axis ``dim`` of size ``V`` into ``axis``, as its faster part."""
    if tensor is None:
        return None
    axis += 1
    if dim is None:
        tensor = tensor.unsqueeze(axis)
        tensor = tensor.expand(*tensor.shape[:axis], V, *tensor.shape[axis + 1 :])
    else:
        tensor = tensor.movedim(dim, axis)
    return tensor.flatten(axis - 1, axis)
