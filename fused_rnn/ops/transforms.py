"""A layer under torch.func: vmap, grad, vjp, jvp and what is made of them.

First-order gradients run on the engine. So does vmap where all share the parameters: it is a larger
batch. Everything else, options too, runs in the eager loop, into which every transform can look.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fused_rnn.engines import reference
from fused_rnn.engines.dispatch import Backend, Choice, choose
from fused_rnn.engines.flops import counted
from fused_rnn.engines.reference import pull_back, replace_marked
from fused_rnn.ops.autograd import LayerFunction
from fused_rnn.spec.batch import BatchLayout
from fused_rnn.spec.context import forward_mode, transformed
from fused_rnn.spec.layer import (
    Engine,
    LayerInputs,
    LayerSpec,
    Needs,
    OutputGrads,
    Outputs,
)
from fused_rnn.spec.precision import without_autocast


def choice_of(
    spec: LayerSpec, device: torch.device, dtype: torch.dtype, backend: Backend
) -> Choice:
    """What runs a layer under a transform, and why."""
    if forward_mode() or torch.compiler.is_compiling() or spec.options is not None:
        reason = "the loop of PyTorch calls, into which a transform can look"
        return Choice("eager", reason, run=reference.run)
    return choose(spec, device, dtype, backend)


def run(spec: LayerSpec, inputs: LayerInputs, backend: Backend, engine: Engine | None) -> Outputs:
    """One layer under a transform, or under those that are left of some.

    ``engine`` is that of :func:`choice_of`, None for the eager loop.
    """
    if engine is None:
        return reference.run(spec, inputs)
    flat = inputs.flatten()
    if transformed():
        outputs = _Layer.apply(spec, backend, *flat)
        return Outputs(outputs[0], outputs[1], outputs[2] if spec.cell.has_c else None)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in flat):
        return Outputs(*LayerFunction.apply(engine, spec, *flat))
    plain, _ = counted(engine).forward(spec, inputs, save=False)
    return plain


def _run(spec: LayerSpec, inputs: LayerInputs, backend: Backend) -> Outputs:
    """The same within a transform, whose engine is chosen for what that has made of the layer."""
    choice = choice_of(spec, inputs.x.device, inputs.x.dtype, backend)
    return run(spec, inputs, backend, choice.engine)


class _Layer(torch.autograd.Function):
    """``apply(spec, backend, *inputs.flatten())`` returns the outputs that the cell has."""

    @staticmethod
    def forward(spec: LayerSpec, backend: Backend, *flat: Tensor | None) -> tuple[Tensor, ...]:
        return _present(_run(spec, LayerInputs.restore(flat), backend))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.spec, ctx.backend, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *output_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        marks, flat = ctx.needs_input_grad[2:], ctx.saved_tensors
        if all(g is None for g in output_grads):
            return (None,) * len(ctx.needs_input_grad)
        grads = OutputGrads(*output_grads)
        with without_autocast(flat[0].device):
            if forward_mode():
                inputs, needs = LayerInputs.restore(flat), Needs.restore(marks)
                return None, None, *pull_back(ctx.spec, inputs, grads, needs).flatten()
            computed = iter(_Gradients.apply(ctx.spec, ctx.backend, marks, *grads, *flat))
            return None, None, *(next(computed) if mark else None for mark in marks)

    @staticmethod
    def vmap(
        info: Any, dims: tuple[Any, ...], spec: LayerSpec, backend: Backend, *flat: Tensor | None
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        dims, V = dims[2:], info.batch_size
        if any(d is not None for d in dims[3:]):
            outputs = torch.vmap(_loop(spec), in_dims=dims)(*flat)
            return outputs, (0,) * len(outputs)
        # In place of each sequence stand V neighbours, in place of a row V rows of the same step.
        B, N, sizes = spec.layout.B, spec.layout.N, spec.layout.batch_sizes
        folded = [_fold(t, d, V, at) for t, d, at in zip(flat, dims, (0, 1, 1), strict=False)]
        wide = BatchLayout(spec.layout.T, B * V, None if sizes is None else _times(sizes, V))
        inputs = LayerInputs.restore([*folded, *flat[3:]])
        out, *states = _present(_run(replace(spec, layout=wide), inputs, backend))
        states = [s.unflatten(1, (B, V)) for s in states]
        return (out.unflatten(0, (N, V)), *states), (1, *[2] * len(states))


class _Gradients(torch.autograd.Function):
    """``apply(spec, backend, marks, *gradients of the 4 outputs, *inputs.flatten())``.

    Returns the gradients of the inputs that ``marks`` wants.
    """

    @staticmethod
    def forward(
        spec: LayerSpec, backend: Backend, marks: tuple[bool, ...], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        grads, inputs = OutputGrads(*tensors[:4]), LayerInputs.restore(tensors[4:])
        engine = choose(spec, inputs.x.device, inputs.x.dtype, backend).engine
        assert engine is not None
        engine = counted(engine)
        outputs, saved = engine.forward(spec, inputs, save=True)
        needs = Needs.restore(marks)
        computed = engine.backward(spec, inputs, outputs.out, saved, grads, needs)
        return _distinct(computed.flatten())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.spec, _, ctx.marks, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *output_grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors, marks = ctx.saved_tensors, ctx.needs_input_grad[3:]
        call = _gradients(ctx.spec, ctx.marks)
        wanted = [t for t, mark in zip(tensors, marks, strict=True) if mark]
        with without_autocast(output_grads[0].device):
            pull = torch.func.vjp(lambda *w: call(*replace_marked(tensors, marks, w)), *wanted)[1]
            computed = iter(pull(output_grads))
        return None, None, None, *(next(computed) if mark else None for mark in marks)

    @staticmethod
    def vmap(
        info: Any,
        dims: tuple[Any, ...],
        spec: LayerSpec,
        backend: Backend,
        marks: tuple[bool, ...],
        *tensors: Tensor | None,
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        computed = torch.vmap(_gradients(spec, marks), in_dims=dims[3:])(*tensors)
        return computed, (0,) * len(computed)


def _loop(spec: LayerSpec) -> Any:
    """The eager loop as a function of flat inputs."""
    return lambda *flat: _present(reference.run(spec, LayerInputs.restore(flat)))


def _gradients(spec: LayerSpec, marks: tuple[bool, ...]) -> Any:
    """What ``_Gradients`` computes of its tensors, by the eager loop."""

    def call(*tensors: Tensor | None) -> tuple[Tensor, ...]:
        grads, inputs = OutputGrads(*tensors[:4]), LayerInputs.restore(tensors[4:])
        return _present(pull_back(spec, inputs, grads, Needs.restore(marks)).flatten())

    return call


def _present(tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    return tuple([t for t in tensors if t is not None])


def _distinct(grads: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Those present; a tensor that stands for two (the biases of a direction) is copied."""
    distinct: list[Tensor] = []
    for grad in _present(grads):
        distinct.append(grad.clone() if any(grad is other for other in distinct) else grad)
    return tuple(distinct)


def _times(sizes: tuple[int, ...], V: int) -> tuple[int, ...]:
    return tuple([n * V for n in sizes])


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
