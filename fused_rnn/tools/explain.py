"""What would run for a layer and an input, and why."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fused_rnn.engines import native, native_rules
from fused_rnn.engines.dispatch import Backend
from fused_rnn.engines.triton import support
from fused_rnn.engines.triton.plans import planned
from fused_rnn.engines.triton.products import plan_request
from fused_rnn.kernels.chips import LIMITS
from fused_rnn.kernels.pieces import cut_stack
from fused_rnn.kernels.plan import DoesNotFit
from fused_rnn.layers import whole_stack
from fused_rnn.layers.base import FusedRecurrent, FusedRNNBase, wavefront_of
from fused_rnn.layers.call import StackCall, describe, describe_layer
from fused_rnn.layers.lstm import FusedLSTM
from fused_rnn.layers.rnn import FusedGRU
from fused_rnn.ops import functional
from fused_rnn.spec.layer import LayerInputs, LayerSpec
from fused_rnn.spec.options import undrawn
from fused_rnn.spec.precision import rnn_precision


@dataclass(frozen=True)
class Explanation:
    """What runs one layer of a stack.

    Attributes:
        layer: its number, from 0 at the input.
        backend: "triton", "cpu", "native" or "eager".
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


# What a call takes, without and with c; a subclass may take something else.
_CALLS = tuple(inspect.signature(cls.forward) for cls in (FusedGRU, FusedLSTM, FusedRecurrent))
Described = tuple[LayerSpec, LayerInputs]


def first_layer(layer: FusedRNNBase, x: Tensor | PackedSequence) -> Described:
    """What the first layer of the stack is to compute in a call ``layer(x)``.

    Raises:
        TypeError: ``layer`` is not a fused layer.
        ValueError: ``x`` does not fit the layer, as in a call; so RuntimeError.
    """
    _check(layer)
    call = describe(layer, x, None, None, None, None, False)
    return describe_layer(layer, call, 0, call.x, undrawn)


def _check(layer: Any) -> None:
    if not isinstance(layer, FusedRNNBase):
        raise TypeError(f"a fused layer is needed, got {type(layer).__name__}")


def _arguments(
    layer: FusedRNNBase, x: Tensor | PackedSequence, call: dict[str, Any]
) -> tuple[Any, Any, Any, Any, bool]:
    """``hx`` as a tuple, ``lengths``, ``reset``, ``mask``, ``return_cell_sequence`` of a call."""
    cell = layer._cell
    given = (
        _CALLS[2 if isinstance(layer, FusedRecurrent) else cell.has_c]
        .bind(layer, x, **call)
        .arguments
    )
    hx, lengths, reset, mask = (given.get(name) for name in ("hx", "lengths", "reset", "mask"))
    if hx is not None and not cell.has_c:
        hx = (hx,)
    cells = given.get("return_cell_sequence") or given.get("return_state_sequences")
    return hx, lengths, reset, mask, bool(cells and cell.has_c)


def explain(
    layer: FusedRNNBase, x: Tensor | PackedSequence, gpu: int | str | None = None, **call: Any
) -> Explanations:
    """Tell which backend would run ``layer(x, **call)``, and why. The layer is not run.

    It is about a call at this place: gradients, training, autocast and transforms of torch.func
    are taken as they are. Compiled and exported layers have no segments, and in training no choice
    that depends on T.

    Args:
        layer: a fused layer.
        x: an input that it accepts.
        gpu: ask for the kernels on a GPU that need not be here: 80, 86, 89, 90, 100, 120 or
            "gfx942".
        **call: what else the call takes: ``hx``, ``lengths``, ``mask``, ``reset``,
            ``return_cell_sequence`` or ``return_state_sequences``.

    Raises:
        TypeError: ``layer`` is not a fused layer, or its call has no such argument.
        ValueError: ``x`` or what comes with it does not fit the layer, as in a call, or ``gpu`` is
            not known; so RuntimeError, also where the call would raise it for its ``backend``.
    """
    _check(layer)
    hx, lengths, reset, mask, cells = _arguments(layer, x, call)
    plain = lengths is None and reset is None and mask is None and not cells
    if gpu is None and plain:
        whole = whole_stack.prepare(layer, x, hx)
        if whole is not None:
            one = "native", whole.reason
            return Explanations(Explanation(n, *one) for n in range(layer.num_layers))
    described = describe(layer, x, hx, lengths, reset, mask, cells)
    explanations: list[Explanation] = []
    how, x_n = "", described.x  # how the layers of a stack share the time
    for number in range(layer.num_layers):
        spec, inputs = describe_layer(layer, described, number, x_n, undrawn)
        record = torch.is_grad_enabled() and any(
            [t is not None and t.requires_grad for t in inputs.flatten()]
        )
        if gpu is None:
            choice = _here(spec, inputs, layer.backend)
        else:
            choice = _on_gpu(spec, inputs.x.dtype, record, layer.backend, gpu)
        if number == 0 and layer.num_layers > 1:
            together = _together(layer, described, spec, inputs, gpu, choice)
            if isinstance(together, tuple):  # all at once, as the first one
                layers = range(layer.num_layers)
                return Explanations(Explanation(n, "triton", "; ".join(together)) for n in layers)
            how = f"; one layer after the other: {together}"
        backend, reason = choice
        explanations.append(Explanation(number, backend, reason + how * (backend == "triton")))
        # In the place of the layer's output, of which only this much counts.
        like = inputs.x.new_empty((), requires_grad=record)
        x_n = like.expand(*x_n.shape[:-1], spec.directions * inputs.h0.shape[-1])
    return Explanations(explanations)


def _here(spec: LayerSpec, inputs: LayerInputs, backend: Backend) -> tuple[str, str]:
    """The backend that runs a layer on this machine, and the reason."""
    route = functional.route_of(spec, inputs, backend)
    prefix = "" if route.segments is None else "segments as a packed batch, "
    return route.choice.backend, prefix + route.choice.reason


def _together(
    layer: FusedRNNBase,
    call: StackCall,
    spec: LayerSpec,
    inputs: LayerInputs,
    gpu: int | str | None,
    first: tuple[str, str],
) -> tuple[str, str] | str:
    """By what plan the layers of a stack overlap, and how; or why they do not.

    ``first`` is what runs the first layer by itself, and why.
    """
    if gpu is None:
        wave = wavefront_of(layer, call, functional.route_of(spec, inputs, layer.backend))
        return wave if isinstance(wave, str) else (wave.engine.plan.reason, str(wave.cuts))
    if first[0] != "triton":
        return f"{first[0]} runs them"
    if refusal := functional.apart(spec, inputs, call.cells):
        return refusal
    if not isinstance(gpu, int):
        return "not on AMD GPUs"
    request = plan_request(spec, inputs.x.dtype, rnn_precision())
    plan = planned(request, LIMITS[gpu])[0]
    train = torch.is_grad_enabled() and any(p.requires_grad for p in layer.parameters())
    cuts = cut_stack(request, plan, layer.num_layers, spec.layout.T, LIMITS[gpu], train=train)
    return (plan.reason, str(cuts)) if cuts.overlap else str(cuts)


def _on_gpu(
    spec: LayerSpec, dtype: torch.dtype, record: bool, backend: Backend, gpu: int | str
) -> tuple[str, str]:
    """What runs on a GPU that need not be here, be it asked for by name or by "auto"."""
    torchs = native.why_not(spec, torch.device("cuda"))
    if refusal := support.refusal(spec, dtype):
        return _instead(torchs, refusal)
    if gpu not in LIMITS:
        raise ValueError(f"gpu {gpu!r} is not known. Select from {list(LIMITS)}.")
    request = plan_request(spec, dtype, rnn_precision())
    try:
        plan = planned(request, LIMITS[gpu])[0]
    except DoesNotFit as refusal:
        return _instead(torchs, str(refusal))
    faster = None
    saving = record and spec.recompute
    if backend == "auto" and not (torchs or saving or isinstance(gpu, str)):
        faster = native_rules.suits_gpu(request, plan, spec.layout, record)
    return ("native", native.because(faster)) if faster else ("triton", plan.reason)


def _instead(torchs: str | None, refusal: str) -> tuple[str, str]:
    """What runs on a GPU where there is no kernel; ``torchs`` speaks against torch.nn's own."""
    reason = f"no fused kernel: {refusal}"
    return ("eager", reason) if torchs else ("native", native.because(reason))
