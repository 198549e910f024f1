"""One layer as opaque operators: what torch.compile and torch.export see of it.

A tracer must neither unroll the time loop nor fix T or B, nor look into an engine. So it gets two
operators, whose shapes follow from those of their inputs; which engine runs is decided when they
run. Untraced calls do not take them: next to a small layer an operator's own time would show.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.flop_counter import register_flop_formula

from fused_rnn import dispatch, eager, flops, transforms
from fused_rnn.cells import BY_NAME
from fused_rnn.dispatch import Backend
from fused_rnn.problem import (
    Engine,
    Extras,
    Grads,
    Layer,
    Masks,
    OutputGrads,
    Outputs,
    Saved,
    Weights,
)
from fused_rnn.rows import Rows
from fused_rnn.tracing import exporting


@dataclass(frozen=True)
class TracedRows:
    """What a tracer knows of :class:`fused_rnn.rows.Rows`: sizes may be symbolic.

    Attributes:
        B: sequences.
        batch_sizes: rows of each step, int64 [T] on the CPU, or None where all own ``B``.
    """

    B: int
    batch_sizes: Tensor | None = None

    @classmethod
    def packed(cls, input: PackedSequence, hx: Sequence[Tensor] | None) -> "TracedRows":
        """The rows of ``input``; values of a tensor are looked at only where no shape tells B."""
        if hx is not None:
            B = hx[0].shape[1]
        elif input.sorted_indices is not None:
            B = input.sorted_indices.shape[0]
        else:
            B = int(input.batch_sizes[0])
        return cls(B, input.batch_sizes)


@dataclass(frozen=True)
class _Call:
    """The arguments of either operator, sorted out.

    Attributes:
        layer: while it is traced, its rows say no more than whether lengths differ.
        inputs: as in :class:`fused_rnn.problem.Engine`.
        engine: what runs where backward is to follow.
        run: what runs where it is not, in place of the engine's forward; or None.
    """

    layer: Layer
    inputs: Saved
    engine: Engine
    run: Callable[[Layer, Saved], Outputs] | None

    @classmethod
    def of(
        cls,
        tensors: Sequence[Tensor],
        batch_sizes: Tensor | None,
        cell: str,
        directions: int,
        recompute: bool,
        backend: Any,
        masks: Sequence[bool],
        zoneout: float,
        clip: float | None,
        cells: bool,
        traced: bool = False,
        record: bool = True,
    ) -> "_Call":
        x, h0, *rest = tensors
        has_c = BY_NAME[cell].has_c
        c0, rest = (rest[0], rest[1:]) if has_c else (None, rest)
        weights = rest[: len(rest) - sum(masks)]
        left = iter(rest[len(weights) :])
        given = [next(left) if here else None for here in masks]
        zoned = zoneout > 0 or Masks(*given).zone_h is not None
        extras = Extras(zoned, zoneout, clip, cells)
        more = extras != Extras() or any(masks)
        if traced:  # whether there is an engine does not depend on T and B
            rows = Rows(1, 1, None if batch_sizes is None else (1,))
        elif batch_sizes is None:
            rows = Rows(x.shape[0], x.shape[1])
        else:
            rows = Rows.packed(batch_sizes)
            if (x.shape[0], h0.shape[1]) != (rows.N, rows.B):
                raise RuntimeError(
                    f"batch_sizes stand for {rows.N} rows of {rows.B} sequences, but got "
                    f"{x.shape[0]} rows and initial states of {h0.shape[1]} sequences"
                )
        layer = Layer(BY_NAME[cell], rows, directions, recompute, extras if more else None)
        flat = _rows(x, batch_sizes)
        assert flat is not None
        found = Masks(*given)
        given[1] = None if found.reset is None else found.reset.flatten()
        given[4:6] = _rows(found.zone_h, batch_sizes), _rows(found.zone_c, batch_sizes)
        inputs = (flat, h0, c0, *_with_absent(weights, directions), *(given if more else ()))
        choice = dispatch.choose_for(layer, inputs, backend, record)
        run = None if record or choice.engine is not None else choice.run
        return cls(layer, inputs, choice.engine or eager, run)


def _with_absent(weights: Sequence[Tensor], directions: int) -> Saved:
    """The parameters of all directions with None for those that the layer lacks."""
    k = len(weights) // directions
    found: list[Tensor | None] = []
    for d in range(directions):
        w_ih, w_hh, *rest = weights[d * k : (d + 1) * k]
        b_ih, b_hh = rest[:2] if k >= 4 else (None, None)
        found += Weights(w_ih, w_hh, b_ih, b_hh, rest[-1] if k % 2 else None)
    return tuple(found)


def _rows(tensor: Tensor | None, batch_sizes: Tensor | None) -> Tensor | None:
    """[T, B, ...], or [N, ...] with ``batch_sizes``, as [N, ...]."""
    if tensor is None or batch_sizes is not None:
        return tensor
    return tensor.reshape(-1, tensor.shape[-1])


def _is_empty(tensors: Sequence[Tensor]) -> bool:
    """Whether there is no sequence in the batch of :func:`layer_op`."""
    return tensors[1].shape[1] == 0


def _present(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [t for t in tensors if t is not None]


# ---- forward ------------------------------------------------------------------------------------


@torch.library.custom_op("fused_rnn::layer", mutates_args=())
def layer_op(
    tensors: list[Tensor],
    batch_sizes: Tensor | None,
    cell: str,
    directions: int,
    recompute: bool,
    backend: str,
    masks: list[bool],
    zoneout: float,
    clip: float | None,
    cells: bool,
    save: bool,
) -> list[Tensor]:
    """Run one layer.

    Args:
        tensors: x [T, B, I], or [N, I] with ``batch_sizes``; h0 [D, B, R]; c0 [D, B, H] if the cell
            has one; the parameters of each direction, as many as there are; those that ``masks``
            marks, reset [T, B] and zones [T, B, .] without ``batch_sizes``.
        batch_sizes: rows of each step, int64 [T] on the CPU, if the sequences differ in length.
        cell: a name of :mod:`fused_rnn.cells`.
        directions: 1 or 2.
        recompute: as in :class:`fused_rnn.problem.Layer`.
        backend: as in :func:`fused_rnn.dispatch.choose`.
        masks: which of the :class:`fused_rnn.problem.Masks` there are.
        zoneout: as in :class:`fused_rnn.problem.Extras`.
        clip: see there.
        cells: see there.
        save: return what backward needs; without, it runs forward a second time.

    Returns:
        out [T, B, D*R] or [N, D*R], h_n [D, B, R], c_n [D, B, H] if the cell has one, with
        ``cells`` c of all steps as out, with ``save`` :meth:`fused_rnn.problem.Engine.saved_specs`
    """
    options = (cell, directions, recompute, backend, masks, zoneout, clip, cells)
    if _is_empty(tensors):  # so are all results
        results: list[Tensor] = _layer_fake(tensors, batch_sizes, *options, save)
        return results
    call = _Call.of(tensors, batch_sizes, *options, record=save)
    saved: Saved = ()
    if call.run is not None:
        outputs = call.run(call.layer, call.inputs)
    else:
        save = save and call.engine.saved_specs(call.layer, call.inputs) is not None
        outputs, saved = call.engine.forward(call.layer, call.inputs, save)
    steps = tensors[0].shape[:-1]
    c_seq = None if outputs.c_seq is None else outputs.c_seq.view(*steps, -1)
    states = _present([outputs.h_n, outputs.c_n, c_seq])
    return [outputs.out.view(*steps, -1), *states, *_present(saved)]


@layer_op.register_fake
def _layer_fake(
    tensors: list[Tensor],
    batch_sizes: Tensor | None,
    cell: str,
    directions: int,
    recompute: bool,
    backend: str,
    masks: list[bool],
    zoneout: float,
    clip: float | None,
    cells: bool,
    save: bool,
) -> list[Tensor]:
    options = (cell, directions, recompute, backend, masks, zoneout, clip, cells)
    call = _Call.of(tensors, batch_sizes, *options, traced=True)
    x, h0 = tensors[:2]
    states = tensors[1:3] if call.layer.cell.has_c else [h0]
    out = x.new_empty(*x.shape[:-1], directions * h0.shape[-1])
    results = [out, *(s.new_empty(s.shape) for s in states)]
    if cells:
        results.append(x.new_empty(*x.shape[:-1], directions * tensors[2].shape[-1]))
    specs = call.engine.saved_specs(call.layer, call.inputs) if save else None
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
    cell: str,
    directions: int,
    recompute: bool,
    backend: str,
    masks: list[bool],
    zoneout: float,
    clip: float | None,
    cells: bool,
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
        cell: of :func:`layer_op`.
        directions: of :func:`layer_op`.
        recompute: of :func:`layer_op`.
        backend: of :func:`layer_op`.
        masks: of :func:`layer_op`.
        zoneout: of :func:`layer_op`.
        clip: of :func:`layer_op`.
        cells: of :func:`layer_op`.

    Returns:
        the gradients of those that ``needs`` marks
    """
    options = (cell, directions, recompute, backend, masks, zoneout, clip, cells)
    if _is_empty(tensors):
        return [torch.zeros_like(t) for t, need in zip(tensors, needs, strict=True) if need]
    call = _Call.of(tensors, batch_sizes, *options)
    layer, inputs, engine = call.layer, call.inputs, call.engine
    out, *rest = results
    out = out.flatten(0, -2)
    specs = engine.saved_specs(layer, inputs)
    if specs is not None and len(rest) == sum(s is not None for s in specs):
        left = iter(rest)
        saved = tuple(None if s is None else next(left) for s in specs)
    elif specs is None:
        saved = ()
    else:
        outputs, saved = engine.forward(layer, inputs, save=True)
        out = outputs.out
    all_grads, marks = _by_place(inputs, grads, given, needs)
    found = engine.backward(layer, inputs, out, saved, all_grads, marks)
    # The two biases of a direction may share one gradient; an operator's results may not.
    result: list[Tensor] = []
    for grad in _as_needed(found, inputs, tensors, needs):
        seen = any(grad.data_ptr() == other.data_ptr() for other in result)
        result.append(grad.clone() if seen else grad.contiguous())
    return result


def _by_place(
    inputs: Saved, grads: Sequence[Tensor], given: Sequence[bool], needs: Sequence[bool]
) -> tuple[OutputGrads, tuple[bool, ...]]:
    """The gradients of all outputs, and which of ``inputs`` want one."""
    left, wanted = iter(grads), iter(needs)
    all_grads = [next(left) if g else None for g in given]
    dout, dh_n, dc_n, dc_seq = (*all_grads, None, None)[:4]
    marks = tuple(t is not None and next(wanted) for t in inputs)
    return (_flat(dout), dh_n, dc_n, _flat(dc_seq)), marks


def _as_needed(
    found: Grads, inputs: Saved, tensors: Sequence[Tensor], needs: Sequence[bool]
) -> Iterator[Tensor]:
    """Those of the gradients of ``inputs`` that ``needs`` marks, in the shapes of ``tensors``."""
    present = [g for g, t in zip(found, inputs, strict=True) if t is not None]
    for grad, tensor, need in zip(present, tensors, needs, strict=True):
        if need:
            yield torch.zeros_like(tensor) if grad is None else grad.reshape(tensor.shape)


def _flat(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else grad.reshape(-1, grad.shape[-1])


@layer_backward_op.register_fake
def _layer_backward_fake(
    grads: list[Tensor],
    given: list[bool],
    tensors: list[Tensor],
    results: list[Tensor],
    needs: list[bool],
    batch_sizes: Tensor | None,
    cell: str,
    directions: int,
    recompute: bool,
    backend: str,
    masks: list[bool],
    zoneout: float,
    clip: float | None,
    cells: bool,
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
    cell: str,
    directions: int,
    recompute: bool,
    backend: str,
    masks: list[bool],
    zoneout: float,
    clip: float | None,
    cells: bool,
) -> list[Tensor]:
    """The same where many gradients are asked for at once, see :func:`autograd.vectorised`."""
    options = (cell, directions, recompute, backend, masks, zoneout, clip, cells)
    call = _Call.of(tensors, batch_sizes, *options)
    all_grads, marks = _by_place(call.inputs, grads, given, needs)
    found = transforms.vjp(call.layer, call.inputs, all_grads, marks)
    return list(_as_needed(found, call.inputs, tensors, needs))


# ---- autograd -----------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, batch_sizes, *options, _ = inputs
    cell, cells = options[0], options[-1]
    ctx.outputs = 2 + BY_NAME[cell].has_c + cells
    ctx.count, ctx.options = len(tensors), options
    # Of the outputs only the first: the caller may overwrite the others.
    ctx.save_for_backward(batch_sizes, *tensors, output[0], *output[ctx.outputs :])
    ctx.mark_non_differentiable(*output[ctx.outputs :])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad[0]
    grads = grads[: ctx.outputs]
    batch_sizes, *rest = ctx.saved_tensors
    found: list[Tensor] = []
    if any(g is not None for g in grads):
        found = layer_backward_op(
            _present(grads),
            [g is not None for g in grads],
            rest[: ctx.count],
            rest[ctx.count :],
            needs,
            batch_sizes,
            *ctx.options,
        )
    left = iter(found)
    return ([next(left, None) if need else None for need in needs], *[None] * 10)


layer_op.register_autograd(_backward, setup_context=_setup_context)


# ---- FLOPs --------------------------------------------------------------------------------------


@register_flop_formula(torch.ops.fused_rnn.layer)
def _layer_flops(
    tensors: list[flops.Size],
    batch_sizes: flops.Size | None,
    cell: str,
    directions: int,
    recompute: bool,
    backend: str,
    masks: list[bool],
    *options: Any,
    out_shape: Any,
) -> int:
    weights = slice(2 + BY_NAME[cell].has_c, len(tensors) - sum(masks))
    return flops.forward(prod(tensors[0][:-1]), tensors[weights])


@register_flop_formula(torch.ops.fused_rnn.layer_backward)
def _layer_backward_flops(
    grads: list[flops.Size],
    given: list[bool],
    tensors: list[flops.Size],
    results: list[flops.Size],
    needs: list[bool],
    batch_sizes: flops.Size | None,
    cell: str,
    directions: int,
    recompute: bool,
    backend: str,
    masks: list[bool],
    *options: Any,
    out_shape: Any,
) -> int:
    weights = slice(2 + BY_NAME[cell].has_c, len(tensors) - sum(masks))
    rows, wanted = prod(tensors[0][:-1]), [needs[0], *needs[weights]]
    return flops.backward(rows, tensors[1], tensors[weights], wanted, needs[1])


# ---- what the traced layer calls ----------------------------------------------------------------


def tracing() -> bool:
    """Whether the layer is traced, so that it must go through the operators.

    Not under a transform of torch.func: an operator's gradient is closed to those, and a tangent
    would be lost silently. There the eager loop is traced, for the T and B at hand.
    """
    recorded = torch.compiler.is_compiling() or torch._C._get_dispatch_mode(_PROXIES) is not None
    return recorded and not transforms.active()


_PROXIES: Any = torch._C._TorchDispatchModeKey.PROXY  # make_fx records


def run(
    cell: str,
    rows: TracedRows,
    directions: int,
    recompute: bool,
    extras: Extras | None,
    inputs: Saved,
    backend: Backend,
) -> Outputs:
    """One layer through the operators.

    ``inputs`` and outputs as in :class:`fused_rnn.problem.Engine`, but rows of a uniform batch are
    [T, B, ...].
    """
    tensors = _present(inputs)
    # An exported graph may serve inference or training: there backward runs forward once more,
    # so that inference need not save anything.
    save = torch.is_grad_enabled() and not exporting()
    save = save and any(t.requires_grad for t in tensors)
    masks = [False] * len(Masks._fields)
    if extras is not None:
        masks = [t is not None for t in inputs[-len(masks) :]]
    options = extras or Extras()
    out, h_n, *rest = layer_op(
        tensors,
        rows.batch_sizes,
        cell,
        directions,
        recompute,
        backend,
        masks,
        options.zoneout,
        options.clip,
        options.cells,
        save,
    )
    c_n = rest[0] if BY_NAME[cell].has_c else None
    return Outputs(out, h_n, c_n, rest[1] if options.cells else None)
