"""The Triton engine: one matrix product before the forward sweep, one per gradient after the other.

x ── x @ W_ih^T + b ──► gates [D, N, H, S] ── forward sweep ──► out, c, gates (overwritten)
dout ── reverse sweep ──► dgates [D, N, H, S] ── dgates^T h_prev, dgates^T x, dgates W_ih
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from fused_rnn import devices, tuning
from fused_rnn.extras import resets
from fused_rnn.kernels.backward import reverse_sweep
from fused_rnn.kernels.extras import Extras
from fused_rnn.kernels.forward import NONE, Rows, forward_sweep
from fused_rnn.kernels.launch import LaunchRefused
from fused_rnn.kernels.plan import DoesNotFit, Plan
from fused_rnn.precision import matmul_precision
from fused_rnn.problem import Grads, Layer, OutputGrads, Outputs, Saved, Specs, Weights
from fused_rnn.triton_products import (
    X_SLOTS,
    gradients,
    project,
    rebuild_gates,
    recurrent_bias,
    recurrent_weights,
)

Result = TypeVar("Result")


@dataclass(slots=True)
class TritonEngine:
    """One layer on a GPU. See :class:`fused_rnn.problem.Engine`.

    Attributes:
        plan: tiles, warps, resources.
        precision: "ieee" or "tf32", of fp32 products; backward keeps that of forward.
    """

    plan: Plan
    precision: Literal["ieee", "tf32"]

    def forward(self, layer: Layer, inputs: Saved, save: bool) -> tuple[Outputs, Saved]:
        """Run the layer; saves the gates and c of all steps, with ``recompute`` c alone."""
        x, h0, c0, flat = _split(inputs)
        weights = _weights(layer, flat)
        with _device_and_precision(x, self.precision):
            gates = project(layer, x, weights)
            w_hh, b_hn = recurrent_weights(layer, weights), recurrent_bias(layer, weights)
            out = x.new_empty(x.shape[0], layer.directions * h0.shape[-1])
            h0, c0 = h0.contiguous(), None if c0 is None else c0.contiguous()
            cells = layer.extras is not None and layer.extras.cells
            tensors = (layer.cell.name, gates, w_hh, b_hn, h0, c0, out)
            how = self._how(layer, inputs) | {"save": save, "cells": cells}
            try:
                swept = forward_sweep(*tensors, **how, plan=self.plan)
            except LaunchRefused as refusal:
                swept = self._smaller(refusal, layer, x, h0, forward_sweep, tensors, how)
        c_seq = swept.c_seq
        # A copy, even in fp32: what is saved for backward is not to be the user's.
        wanted = c_seq.to(x.dtype, copy=True) if c_seq is not None and cells else None
        outputs = Outputs(out, swept.h_n, swept.c_n, wanted)
        if not save:
            return outputs, ()
        keep_gates = _saves_gates(layer) and not layer.recompute
        # What only a group's own product needs is not saved: whether there is a group depends on B,
        # which a tracer that has to know what is saved does not.
        fed = swept.fed if _saves_fed(layer, inputs) else None
        return outputs, (gates if keep_gates else None, c_seq, fed)

    def saved_specs(self, layer: Layer, inputs: Saved) -> Specs:
        """See :class:`fused_rnn.problem.Engine`."""
        x, h0, c0, _ = _split(inputs)
        D, _, H = h0.shape
        slots = 1 if len(X_SLOTS[layer.cell.name]) == 1 else 4
        kept = _saves_gates(layer) and not layer.recompute
        return (
            ((D, x.shape[0], H, slots), x.dtype) if kept else None,
            None if c0 is None else ((x.shape[0], D * H), torch.float32),
            ((x.shape[0], D * H), x.dtype) if _saves_fed(layer, inputs) else None,
        )

    def backward(
        self,
        layer: Layer,
        inputs: Saved,
        out: Tensor,
        saved: Saved,
        grads: OutputGrads,
        needs: tuple[bool, ...],
    ) -> Grads:
        """The reverse sweep, then one matrix product for each gradient that is needed."""
        x, h0, c0, flat = _split(inputs)
        weights = _weights(layer, flat)
        gates, c_seq, fed = saved
        with _device_and_precision(x, self.precision):
            if gates is None and _saves_gates(layer):
                gates = rebuild_gates(layer, x, h0, out, fed, weights)
            w_hh = recurrent_weights(layer, weights)
            first = h0.contiguous(), None if c0 is None else c0.contiguous()
            given = [None if g is None else g.contiguous() for g in grads]
            tensors: tuple[Any, ...] = (
                layer.cell.name,
                gates,
                c_seq,
                out,
                w_hh,
                *first,
                *given,
            )
            how = self._how(layer, inputs)
            try:
                found = reverse_sweep(*tensors, **how, plan=self.plan)
            except LaunchRefused as refusal:
                found = self._smaller(refusal, layer, x, h0, reverse_sweep, tensors, how)
            dx, dflat = gradients(layer, x, h0, out, fed, weights, found.dgates, needs)
        states = [
            g.to(x.dtype) if need and g is not None else None
            for g, need in zip((found.dh0, found.dc0), needs[1:3], strict=True)
        ]
        if layer.extras is None:
            return dx, *states, *dflat
        restarts = [
            None if g is None else g.sum(1).to(x.dtype)
            for g in (found.drestart_h, found.drestart_c)
        ]
        return dx, *states, *dflat, None, None, *restarts, None, None, None

    def _how(self, layer: Layer, inputs: Saved) -> dict[str, Any]:
        """The keywords of both sweeps, but for the plan."""
        x, rows = inputs[0], layer.rows
        assert x is not None
        offsets = None if rows.batch_sizes is None else rows.offsets(x.device)
        return {
            "rows": Rows(rows.T, rows.B, x.shape[0], offsets),
            "reverse": _REVERSE[: layer.directions],
            "precision": self.precision,
            "extras": NONE if layer.extras is None else _kernel_extras(layer, inputs),
        }

    def _smaller(
        self,
        refusal: LaunchRefused,
        layer: Layer,
        x: Tensor,
        h0: Tensor,
        sweep: Callable[..., Result],
        tensors: tuple[Any, ...],
        how: dict[str, Any],
    ) -> Result:
        """Run a sweep that the driver refused by a plan of fewer programs.

        Raises:
            RuntimeError: no plan has so few programs that the driver takes them.
        """
        chip = devices.kernel_device(x.device)
        assert chip is not None
        H, B, D = h0.shape[-1], layer.rows.B, layer.directions
        request = tuning.Request(layer.cell.name, H, x.dtype, B, D, self.precision)
        refused = self.plan
        while True:
            devices.limit_programs(chip, refusal.programs)
            try:
                plan = tuning.choose_plan(request, devices.device_limits(chip), chip)
            except DoesNotFit as reason:
                text = f"{refusal}; and no plan has fewer programs: {reason}"
                raise RuntimeError(text) from refusal
            if plan == refused:  # it is forced
                raise refusal
            try:
                return sweep(*tensors, **how, plan=plan)
            except LaunchRefused as again:
                refusal, refused = again, plan


_REVERSE = (False, True)


def _split(inputs: Saved) -> tuple[Tensor, Tensor, Tensor | None, Saved]:
    x, h0, c0, *flat = inputs
    assert x is not None
    assert h0 is not None
    return x, h0, c0, tuple(flat)


def _weights(layer: Layer, flat: Saved) -> list[Weights]:
    """The parameters by direction, with rows one behind the other: kernels know no strides."""
    return list(layer.unflatten([None if t is None else t.contiguous() for t in flat]))


def _saves_gates(layer: Layer) -> bool:
    """Whether backward needs the gates.

    A one-gate cell recovers its gate from the output, except under zoneout.
    """
    zoned = layer.extras is not None and layer.extras.zoned
    return len(X_SLOTS[layer.cell.name]) > 1 or zoned


def _saves_fed(layer: Layer, inputs: Saved) -> bool:
    """Whether backward needs what the recurrent product took: it is not h0 and the output."""
    masks = layer.masks(inputs)
    return any(t is not None for t in (masks.lengths, masks.reset, masks.drop))


def _kernel_extras(layer: Layer, inputs: Saved) -> Extras:
    """The extras as the kernels take them."""
    assert layer.extras is not None
    masks = layer.masks(inputs)
    reset, lengths = resets(layer, masks), masks.lengths

    def bytes_of(mask: Tensor | None) -> Tensor | None:
        return None if mask is None else mask.contiguous().view(torch.uint8)

    plain = [
        None if t is None else t.contiguous()
        for t in (masks.restart_h, masks.restart_c, masks.drop)
    ]
    return Extras(
        lengths=None if lengths is None else lengths.clamp(0, layer.rows.T).to(torch.int32),
        reset=bytes_of(reset),
        restart_h=plain[0],
        restart_c=plain[1],
        zone_h=bytes_of(masks.zone_h),
        zone_c=bytes_of(masks.zone_c),
        zoneout=layer.extras.zoneout if layer.extras.zoned and masks.zone_h is None else None,
        drop=plain[2],
        clip=layer.extras.clip,
    )


def _device_and_precision(
    x: Tensor, precision: Literal["ieee", "tf32"]
) -> AbstractContextManager[Any]:
    """Make the device of a tensor the current one, and set the precision of fp32 products there."""
    if not x.is_cuda:
        return nullcontext()
    # Backward runs in a thread of its own, whose current device may be another.
    elsewhere = torch.cuda.current_device() != x.device.index
    if x.dtype != torch.float32:
        return torch.cuda.device(x.device) if elsewhere else nullcontext()
    if not elsewhere:
        return matmul_precision(precision)
    contexts = ExitStack()
    contexts.enter_context(torch.cuda.device(x.device))
    contexts.enter_context(matmul_precision(precision))
    return contexts
