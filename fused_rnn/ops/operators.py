"""Layers as opaque operators: what torch.compile and torch.export see of them.

A tracer must neither unroll the time loop nor fix T or B, nor look into an engine. So it gets two
operators, whose shapes follow from those of their inputs; which engine runs is decided when they
run. Untraced calls do not take them: next to a small layer an operator's own time would show.
"""

from collections.abc import Sequence
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fused_rnn.engines import flops
from fused_rnn.engines.dispatch import Backend
from fused_rnn.ops.encoding import Settings, by_layer, present
from fused_rnn.ops.traced import Stack
from fused_rnn.spec.batch import TracedLayout
from fused_rnn.spec.context import exporting
from fused_rnn.spec.layer import LayerInputs, LayerSpec, Needs, Options, Outputs


def _is_empty(tensors: Sequence[Tensor]) -> bool:
    """Whether there is no sequence in the batch of :func:`layers_op`."""
    return tensors[1].shape[1] == 0


# ---- forward ------------------------------------------------------------------------------------


@torch.library.custom_op("fused_rnn::layers", mutates_args=())
def layers_op(
    tensors: list[Tensor],
    masks: list[Tensor],
    batch_sizes: Tensor | None,
    settings: str,
    numbers: list[float],
    dropout: float,
    lowest: int,
) -> list[Tensor]:
    """Run one layer, or a stack of L layers of one direction.

    Args:
        tensors: of each layer those of :class:`fused_rnn.spec.layer.LayerInputs` that there are,
            in its order, x of the first alone; but x is [T, B, I], reset [T, B] and zones are
            [T, B, .] without ``batch_sizes``.
        masks: bool, what dropout behind each layer but the last lets pass, as out; or none.
        batch_sizes: rows of each step, int64 [T] on the CPU, if the sequences differ in length.
        settings: of each layer, see :class:`fused_rnn.ops.encoding.Settings`; "; " between them.
        numbers: zoneout, where no masks say it unit by unit; and clip, if there is one.
        dropout: probability that an element is dropped.
        lowest: return what backward needs of this layer and those above it. L for nothing;
            backward then runs forward a second time.

    Returns:
        out [T, B, D*R] or [N, D*R], h_n [L*D, B, R], c_n [L*D, B, H] if the cell has one, c of all
        steps as out if it is asked for; then, for backward, the outputs of `Stack.kept` and of each
        layer what the engine's ``saved_specs`` tells
    """
    how = tensors, masks, batch_sizes, settings, numbers, dropout, lowest
    if _is_empty(tensors):  # so are all results
        empty: list[Tensor] = _layers_fake(*how)
        return empty
    stack = Stack(*how)
    outs, (h_n, c_n, c_seq), saved = stack.run()
    steps = tensors[0].shape[:-1]
    rows = [outs[-1], c_seq, *[outs[number] for number in stack.kept]]
    out, c_seq, *kept = [None if t is None else t.view(*steps, -1) for t in rows]
    return present([out, h_n, c_n, c_seq, *kept, *chain.from_iterable(saved)])


@layers_op.register_fake
def _layers_fake(
    tensors: list[Tensor],
    masks: list[Tensor],
    batch_sizes: Tensor | None,
    settings: str,
    numbers: list[float],
    dropout: float,
    lowest: int,
) -> list[Tensor]:
    how = tensors, masks, batch_sizes, settings, numbers, dropout, lowest
    stack = Stack(*how, traced=True)
    x, L, first = tensors[0], len(stack.calls), stack.calls[0]
    (_, h0, c0, *_), D = first.inputs, first.spec.directions

    def of_all_steps(state: Tensor) -> Tensor:
        return x.new_empty(*x.shape[:-1], D * state.shape[-1])

    results = [of_all_steps(h0), h0.new_empty(L * D, *h0.shape[1:])]
    if c0 is not None:
        results.append(c0.new_empty(L * D, *c0.shape[1:]))
        if stack.told[-1].cells:
            results.append(of_all_steps(c0))
    results += [of_all_steps(h0) for _ in stack.kept]
    specs = chain.from_iterable(stack.specs(number) or () for number in range(lowest, L))
    return results + [x.new_empty(s[0], dtype=s[1]) for s in specs if s is not None]


# ---- backward -----------------------------------------------------------------------------------


@torch.library.custom_op("fused_rnn::layers_backward", mutates_args=())
def layers_backward_op(
    grads: list[Tensor],
    given: list[bool],
    results: list[Tensor],
    needs: list[bool],
    tensors: list[Tensor],
    masks: list[Tensor],
    batch_sizes: Tensor | None,
    settings: str,
    numbers: list[float],
    dropout: float,
    lowest: int,
) -> list[Tensor]:
    """Gradients of the inputs of :func:`layers_op`, whose arguments follow these.

    Args:
        grads: gradients of those of the outputs that ``given`` marks; the others are zero.
        given: which outputs have a gradient.
        results: the first of :func:`layers_op`'s, and what it returns for backward.
        needs: which of ``tensors`` want a gradient.
        tensors: these and all others as there.
        masks: as there.
        batch_sizes: as there.
        settings: as there.
        numbers: as there.
        dropout: as there.
        lowest: as there.

    Returns:
        the gradients of those that ``needs`` marks
    """
    how = tensors, masks, batch_sizes, settings, numbers, dropout, lowest
    if _is_empty(tensors):
        return [torch.zeros_like(t) for t, need in zip(tensors, needs, strict=True) if need]
    stack = Stack(*how, recorded=True)
    ran, places = stack.restored(results), stack.sorted_grads(grads, given, needs)
    # The biases of a direction may share one gradient, and states of layers their memory; an
    # operator's results may not.
    distinct: list[Tensor] = []
    taken: set[int] = set()
    for grad in stack.wanted(stack.backward(ran, *places), needs):
        memory = grad.untyped_storage().data_ptr()
        distinct.append(grad.clone() if memory in taken else grad.contiguous())
        taken.add(memory)
    return distinct


@layers_backward_op.register_fake
def _layers_backward_fake(
    grads: list[Tensor],
    given: list[bool],
    results: list[Tensor],
    needs: list[bool],
    tensors: list[Tensor],
    *how: Any,
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, need in zip(tensors, needs, strict=True) if need]


_LIBRARY = torch.library.Library("fused_rnn", "FRAGMENT")


@torch.library.impl(_LIBRARY, "layers_backward", "Batched")
def _layers_backward_of_many(
    grads: list[Tensor],
    given: list[bool],
    results: list[Tensor],
    needs: list[bool],
    *how: Any,
) -> list[Tensor]:
    """The same where many gradients are asked for at once, as by ``is_grads_batched=True``."""
    stack = Stack(*how, recorded=True)
    ran, places = stack.restored(results), stack.sorted_grads(grads, given, needs)
    return stack.wanted(stack.pull_back(ran, *places), needs)


# ---- autograd -----------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, masks, batch_sizes, settings, *numbers = inputs
    told = Settings.each(settings)[-1]
    ctx.outputs = 2 + told.cell.has_c + told.cells
    ctx.counts, ctx.settings, ctx.numbers = (len(tensors), len(masks)), settings, numbers
    # Of the outputs only the first: the caller may overwrite the others.
    ctx.save_for_backward(batch_sizes, *tensors, *masks, output[0], *output[ctx.outputs :])
    ctx.mark_non_differentiable(*output[ctx.outputs :])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad[0]
    grads = grads[: ctx.outputs]
    batch_sizes, *rest = ctx.saved_tensors
    tensors, rest = rest[: ctx.counts[0]], rest[ctx.counts[0] :]
    masks, results = rest[: ctx.counts[1]], rest[ctx.counts[1] :]
    computed: list[Tensor] = []
    if any(g is not None for g in grads):
        given = [g is not None for g in grads]
        how = tensors, masks, batch_sizes, ctx.settings, *ctx.numbers
        computed = layers_backward_op(present(grads), given, results, needs, *how)
    left = iter(computed)
    grad_of_tensors = [next(left, None) if need else None for need in needs]
    return (grad_of_tensors, [None] * len(masks), None, None, None, None, None)


layers_op.register_autograd(_backward, setup_context=_setup_context)


# ---- FLOPs --------------------------------------------------------------------------------------


@register_flop_formula(torch.ops.fused_rnn.layers)
def _layers_flops(
    tensors: list[flops.Size],
    masks: list[flops.Size],
    batch_sizes: flops.Size | None,
    settings: str,
    *rest: Any,
    out_shape: Any,
) -> int:
    N, total = prod(tensors[0][:-1]), 0
    each = Settings.each(settings)
    for told, sizes in zip(each, by_layer(tensors, each, None), strict=True):
        weights: Any = list(chain.from_iterable(told.restore(sizes).weights))
        total += flops.forward(N, weights)
    return total


@register_flop_formula(torch.ops.fused_rnn.layers_backward)
def _layers_backward_flops(
    grads: list[flops.Size],
    given: list[bool],
    results: list[flops.Size],
    needs: list[bool],
    tensors: list[flops.Size],
    masks: list[flops.Size],
    batch_sizes: flops.Size | None,
    settings: str,
    *rest: Any,
    out_shape: Any,
) -> int:
    N, h0, total = prod(tensors[0][:-1]), tensors[1], 0
    # A layer that is not the first gives its input a gradient where anything below wants one.
    each = Settings.each(settings)
    parts = zip(each, by_layer(tensors, each, None), by_layer(needs, each, None), strict=True)
    below = False
    for told, sizes, marks in parts:
        wanted = iter(marks)
        flat = [there and next(wanted) for there in told.present]
        need = Needs.restore([below if mark is None else mark for mark in flat])
        weights: Any = list(chain.from_iterable(told.restore(sizes).weights))
        needed = [need.x, *chain.from_iterable(need.weights)]
        if any(need.flatten()):
            total += flops.backward(N, h0, weights, needed, need.h0)
            below = True
    return total


# ---- what the traced layer calls ----------------------------------------------------------------


def run(
    layers: Sequence[tuple[LayerSpec, LayerInputs]],
    backend: Backend,
    masks: Sequence[Tensor] = (),
    dropout: float = 0.0,
) -> Outputs:
    """One layer or a stack through the operators; rows of a uniform batch are [T, B, .].

    Args:
        layers: of one spec but for the inputs' sizes, x being that of the first.
        backend: what the user asks for.
        masks: what dropout behind each layer but the last lets pass, or none.
        dropout: probability that an element is dropped.
    """
    spec, _ = layers[-1]
    layout, options = spec.layout, spec.options or Options()
    assert isinstance(layout, TracedLayout)
    # An exported graph may serve inference or training: there backward runs forward once more,
    # so that inference need not save anything.
    record = torch.is_grad_enabled() and not exporting()
    lowest = len(layers)
    tensors: list[Tensor] = []
    for number, (_, inputs) in enumerate(layers):
        mine = present(inputs.flatten())[min(number, 1) :]
        if record and lowest == len(layers) and any([t.requires_grad for t in mine]):
            lowest = number
        tensors = tensors + mine
    numbers = [options.zoneout] if options.clip is None else [options.zoneout, options.clip]
    settings = "; ".join([Settings.text(spec, inputs, backend) for spec, inputs in layers])
    how = list(masks), layout.batch_sizes, settings, numbers, dropout, lowest
    out, h_n, *rest = layers_op(tensors, *how)
    c_n = rest[0] if spec.cell.has_c else None
    return Outputs(out, h_n, c_n, rest[1] if options.cells else None)
