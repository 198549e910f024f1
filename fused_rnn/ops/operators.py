"""One layer as opaque operators: what torch.compile and torch.export see of it.

A tracer must neither unroll the time loop nor fix T or B, nor look into an engine. So it gets two
operators, whose shapes follow from those of their inputs; which engine runs is decided when they
run. Untraced calls do not take them: next to a small layer an operator's own time would show.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fused_rnn.engines import flops, reference
from fused_rnn.engines.dispatch import Backend
from fused_rnn.ops.encoding import Settings, present, rows_of, sorted_out
from fused_rnn.spec.batch import TracedLayout
from fused_rnn.spec.context import exporting
from fused_rnn.spec.layer import (
    InputGrads,
    LayerInputs,
    LayerSpec,
    Needs,
    Options,
    OutputGrads,
    Outputs,
    Saved,
)


def _is_empty(tensors: Sequence[Tensor]) -> bool:
    """Whether there is no sequence in the batch of :func:`layer_op`."""
    return tensors[1].shape[1] == 0


# ---- forward ------------------------------------------------------------------------------------


@torch.library.custom_op("fused_rnn::layer", mutates_args=())
def layer_op(
    tensors: list[Tensor],
    batch_sizes: Tensor | None,
    settings: str,
    numbers: list[float],
    save: bool,
) -> list[Tensor]:
    """Run one layer.

    Args:
        tensors: those of :class:`fused_rnn.spec.layer.LayerInputs` that there are, in its order;
            but x is [T, B, I], reset [T, B] and zones are [T, B, .] without ``batch_sizes``.
        batch_sizes: rows of each step, int64 [T] on the CPU, if the sequences differ in length.
        settings: see :class:`fused_rnn.ops.encoding.Settings`.
        numbers: zoneout, where no masks say it unit by unit; and clip, if there is one.
        save: return what backward needs; without, it runs forward a second time.

    Returns:
        out [T, B, D*R] or [N, D*R], h_n [D, B, R], c_n [D, B, H] if the cell has one, c of all
        steps as out if it is asked for, with ``save`` what the engine's ``saved_specs`` tells
    """
    if _is_empty(tensors):  # so are all results
        empty: list[Tensor] = _layer_fake(tensors, batch_sizes, settings, numbers, save)
        return empty
    call = sorted_out(tensors, batch_sizes, settings, numbers, record=save)
    saved: Saved = ()
    if call.run is not None:
        outputs = call.run(call.spec, call.inputs)
    else:
        save = save and call.engine.saved_specs(call.spec, call.inputs) is not None
        outputs, saved = call.engine.forward(call.spec, call.inputs, save)
    steps = tensors[0].shape[:-1]
    c_seq = None if outputs.c_seq is None else outputs.c_seq.view(*steps, -1)
    states = present([outputs.h_n, outputs.c_n, c_seq])
    return [outputs.out.view(*steps, -1), *states, *present(saved)]


@layer_op.register_fake
def _layer_fake(
    tensors: list[Tensor],
    batch_sizes: Tensor | None,
    settings: str,
    numbers: list[float],
    save: bool,
) -> list[Tensor]:
    call = sorted_out(tensors, batch_sizes, settings, numbers, traced=True)
    x, (_, h0, c0, *_), D = tensors[0], call.inputs, call.spec.directions
    results = [x.new_empty(*x.shape[:-1], D * h0.shape[-1]), h0.new_empty(h0.shape)]
    if c0 is not None:
        results.append(c0.new_empty(c0.shape))
        if Settings.of(settings).cells:
            results.append(x.new_empty(*x.shape[:-1], D * c0.shape[-1]))
    specs = call.engine.saved_specs(call.spec, call.inputs) if save else None
    return results + [x.new_empty(s[0], dtype=s[1]) for s in specs or () if s is not None]


# ---- backward -----------------------------------------------------------------------------------


@torch.library.custom_op("fused_rnn::layer_backward", mutates_args=())
def layer_backward_op(
    grads: list[Tensor],
    given: list[bool],
    tensors: list[Tensor],
    results: list[Tensor],
    needs: list[bool],
    batch_sizes: Tensor | None,
    settings: str,
    numbers: list[float],
) -> list[Tensor]:
    """Gradients of a layer's inputs.

    Args:
        grads: gradients of those of the outputs that ``given`` marks; the others are zero.
        given: which outputs have a gradient.
        tensors: of :func:`layer_op`.
        results: the first of :func:`layer_op`'s, and what ``save`` adds; without that, forward runs
            a second time.
        needs: which of ``tensors`` want a gradient.
        batch_sizes: of :func:`layer_op`.
        settings: of :func:`layer_op`.
        numbers: of :func:`layer_op`.

    Returns:
        the gradients of those that ``needs`` marks
    """
    if _is_empty(tensors):
        return [torch.zeros_like(t) for t, need in zip(tensors, needs, strict=True) if need]
    spec, inputs, engine, _ = sorted_out(tensors, batch_sizes, settings, numbers)
    out, *rest = results
    out = out.flatten(0, -2)
    specs = engine.saved_specs(spec, inputs)
    if specs is not None and len(rest) == sum(s is not None for s in specs):
        left = iter(rest)
        saved: Saved = tuple(None if s is None else next(left) for s in specs)
    elif specs is None:
        saved = ()
    else:
        outputs, saved = engine.forward(spec, inputs, save=True)
        out = outputs.out
    all_grads, marks = _by_place(inputs, grads, given, needs)
    computed = engine.backward(spec, inputs, out, saved, all_grads, marks)
    # The two biases of a direction may share one gradient; an operator's results may not.
    distinct: list[Tensor] = []
    for grad in _as_needed(computed, inputs, tensors, needs):
        seen = any(grad.data_ptr() == other.data_ptr() for other in distinct)
        distinct.append(grad.clone() if seen else grad.contiguous())
    return distinct


def _by_place(
    inputs: LayerInputs, grads: Sequence[Tensor], given: Sequence[bool], needs: Sequence[bool]
) -> tuple[OutputGrads, Needs]:
    """The gradients of all outputs, and which of the ``inputs`` want one."""
    left, wanted = iter(grads), iter(needs)
    dout, dh_n, dc_n, dc_seq = (*[next(left) if g else None for g in given], None, None)[:4]
    marks = [t is not None and next(wanted) for t in inputs.flatten()]
    return OutputGrads(rows_of(dout), dh_n, dc_n, rows_of(dc_seq)), Needs.restore(marks)


def _as_needed(
    computed: InputGrads, inputs: LayerInputs, tensors: Sequence[Tensor], needs: Sequence[bool]
) -> Iterator[Tensor]:
    """Those of the gradients of ``inputs`` that ``needs`` marks, in the shapes of ``tensors``."""
    both = zip(computed.flatten(), inputs.flatten(), strict=True)
    present = [grad for grad, tensor in both if tensor is not None]
    for grad, tensor, need in zip(present, tensors, needs, strict=True):
        if need:
            yield torch.zeros_like(tensor) if grad is None else grad.reshape(tensor.shape)


@layer_backward_op.register_fake
def _layer_backward_fake(
    grads: list[Tensor],
    given: list[bool],
    tensors: list[Tensor],
    results: list[Tensor],
    needs: list[bool],
    batch_sizes: Tensor | None,
    settings: str,
    numbers: list[float],
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, need in zip(tensors, needs, strict=True) if need]


_LIBRARY = torch.library.Library("fused_rnn", "FRAGMENT")


@torch.library.impl(_LIBRARY, "layer_backward", "Batched")
def _layer_backward_of_many(
    grads: list[Tensor],
    given: list[bool],
    tensors: list[Tensor],
    results: list[Tensor],
    needs: list[bool],
    batch_sizes: Tensor | None,
    settings: str,
    numbers: list[float],
) -> list[Tensor]:
    """The same where many gradients are asked for at once, as by ``is_grads_batched=True``."""
    spec, inputs, *_ = sorted_out(tensors, batch_sizes, settings, numbers)
    all_grads, marks = _by_place(inputs, grads, given, needs)
    computed = reference.pull_back(spec, inputs, all_grads, marks)
    return list(_as_needed(computed, inputs, tensors, needs))


# ---- autograd -----------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, batch_sizes, settings, numbers, _ = inputs
    told = Settings.of(settings)
    ctx.outputs = 2 + told.cell.has_c + told.cells
    ctx.count, ctx.settings, ctx.numbers = len(tensors), settings, numbers
    # Of the outputs only the first: the caller may overwrite the others.
    ctx.save_for_backward(batch_sizes, *tensors, output[0], *output[ctx.outputs :])
    ctx.mark_non_differentiable(*output[ctx.outputs :])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad[0]
    grads = grads[: ctx.outputs]
    batch_sizes, *rest = ctx.saved_tensors
    computed: list[Tensor] = []
    if any(g is not None for g in grads):
        computed = layer_backward_op(
            present(grads),
            [g is not None for g in grads],
            rest[: ctx.count],
            rest[ctx.count :],
            needs,
            batch_sizes,
            ctx.settings,
            ctx.numbers,
        )
    left = iter(computed)
    return ([next(left, None) if need else None for need in needs], None, None, None, None)


layer_op.register_autograd(_backward, setup_context=_setup_context)


# ---- FLOPs --------------------------------------------------------------------------------------


@register_flop_formula(torch.ops.fused_rnn.layer)
def _layer_flops(
    tensors: list[flops.Size],
    batch_sizes: flops.Size | None,
    settings: str,
    *rest: Any,
    out_shape: Any,
) -> int:
    weights = Settings.of(settings).restore(tensors).weights
    sizes: Any = list(chain.from_iterable(weights))
    return flops.forward(prod(tensors[0][:-1]), sizes)


@register_flop_formula(torch.ops.fused_rnn.layer_backward)
def _layer_backward_flops(
    grads: list[flops.Size],
    given: list[bool],
    tensors: list[flops.Size],
    results: list[flops.Size],
    needs: list[bool],
    batch_sizes: flops.Size | None,
    settings: str,
    *rest: Any,
    out_shape: Any,
) -> int:
    told = Settings.of(settings)
    sizes: Any = list(chain.from_iterable(told.restore(tensors).weights))
    wanted = iter(needs)
    marks = Needs.restore([there and next(wanted) for there in told.present])
    needed = [marks.x, *chain.from_iterable(marks.weights)]
    return flops.backward(prod(tensors[0][:-1]), tensors[1], sizes, needed, marks.h0)


# ---- what the traced layer calls ----------------------------------------------------------------


def run(spec: LayerSpec, inputs: LayerInputs, backend: Backend) -> Outputs:
    """One layer through the operators; rows of a uniform batch are [T, B, .], outputs, too."""
    layout, options = spec.layout, spec.options or Options()
    assert isinstance(layout, TracedLayout)
    tensors = present(inputs.flatten())
    # An exported graph may serve inference or training: there backward runs forward once more,
    # so that inference need not save anything.
    save = torch.is_grad_enabled() and not exporting()
    save = save and any([t.requires_grad for t in tensors])
    numbers = [options.zoneout] if options.clip is None else [options.zoneout, options.clip]
    settings = Settings.text(spec, inputs, backend)
    out, h_n, *rest = layer_op(tensors, layout.batch_sizes, settings, numbers, save)
    c_n = rest[0] if spec.cell.has_c else None
    return Outputs(out, h_n, c_n, rest[1] if options.cells else None)
