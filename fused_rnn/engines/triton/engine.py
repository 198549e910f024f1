"""The Triton engine: one matrix product before the forward sweep, one per gradient after the other.

x ── x @ W_ih^T + b ──► gates [D, N, H, S] ── forward sweep ──► out, c, gates (overwritten)
dout ── reverse sweep ──► dgates [D, N, H, S] ── dgates^T h_prev, dgates^T x, dgates W_ih
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from fused_rnn.engines.triton import devices, plans
from fused_rnn.engines.triton.products import (
    contiguous,
    gradients,
    kernel_cell,
    own_vectors,
    plan_request,
    project,
    recurrent_bias,
    recurrent_weights,
)
from fused_rnn.engines.triton.rebuild import rebuild_gates
from fused_rnn.kernels.launch import Launch, LaunchRefused, launch
from fused_rnn.kernels.plan import DoesNotFit, Plan, Precision
from fused_rnn.kernels.sweep import NONE, DeviceLayout, Sweep, SweepOptions
from fused_rnn.kernels.sweeps import prepare_forward, prepare_reverse
from fused_rnn.spec.layer import (
    InputGrads,
    LayerInputs,
    LayerSpec,
    Needs,
    OptionTensors,
    OutputGrads,
    Outputs,
    Saved,
    Specs,
)
from fused_rnn.spec.options import resets
from fused_rnn.spec.precision import matmul_precision

Result = TypeVar("Result")
_REVERSE = (False, True)


@dataclass(slots=True)
class TritonEngine:
    """One layer on a GPU. See :class:`fused_rnn.spec.layer.Engine`.

    Attributes:
        plan: tiles, warps, resources.
        precision: "ieee" or "tf32", of fp32 products; backward keeps that of forward.
    """

    plan: Plan
    precision: Precision

    def forward(self, spec: LayerSpec, inputs: LayerInputs, save: bool) -> tuple[Outputs, Saved]:
        """Run the layer; saves the gates and c of all steps, with ``recompute`` c alone."""
        inputs = contiguous(inputs)
        x, h0, c0, weights, _ = inputs
        cells = spec.options is not None and spec.options.cells
        with device_and_precision(x, self.precision):
            gates = project(spec, x, weights)
            w_hh, b_hn = recurrent_weights(spec, weights), recurrent_bias(spec, weights)
            out = x.new_empty(x.shape[0], spec.directions * h0.shape[-1])
            tensors = (gates, w_hh, b_hn, h0, c0, out, save, cells, own_vectors(weights))
            what, result = prepare_forward(self._sweep(spec, inputs), *tensors)
            try:
                launch(what)
            except LaunchRefused as refusal:
                result = self._smaller(refusal, spec, inputs, prepare_forward, tensors)
        c_seq = result.c_seq
        # A copy, even in fp32: what is saved for backward is not to be the user's.
        wanted = c_seq.to(x.dtype, copy=True) if c_seq is not None and cells else None
        outputs = Outputs(out, result.h_n, result.c_n, wanted)
        if not save:
            return outputs, ()
        keep_gates = needs_gates(spec) and not spec.recompute
        # What only a group's own product needs is not saved: whether there is a group depends on B,
        # which a tracer that has to know what is saved does not.
        operand = result.operand if saves_operand(inputs.options) else None
        return outputs, (gates if keep_gates else None, c_seq, operand)

    def saved_specs(self, spec: LayerSpec, inputs: LayerInputs) -> Specs:
        """Of the gates, c of all steps, and the operands of the recurrent product."""
        x, D, H, K = inputs.x, spec.directions, spec.hidden_size, kernel_cell(spec).states - 1
        k, keep_gates = spec.heads, needs_gates(spec) and not spec.recompute
        return (
            ((D * k, x.shape[0], H // k, kernel_cell(spec).slots), x.dtype) if keep_gates else None,
            None if inputs.c0 is None else ((x.shape[0], D * K * H), torch.float32),
            ((x.shape[0], D * H), x.dtype) if saves_operand(inputs.options) else None,
        )

    def backward(
        self,
        spec: LayerSpec,
        inputs: LayerInputs,
        out: Tensor,
        saved: Saved,
        grads: OutputGrads,
        needs: Needs,
    ) -> InputGrads:
        """The reverse sweep, then one matrix product for each gradient that is needed."""
        inputs = contiguous(inputs)
        x, h0, c0, weights, _ = inputs
        gates, c_seq, operand = saved
        with device_and_precision(x, self.precision):
            if gates is None and needs_gates(spec):
                gates = rebuild_gates(spec, inputs, out, c_seq, operand)
            given = [None if g is None else g.contiguous() for g in grads]
            w_hh = recurrent_weights(spec, weights)
            tensors = (gates, c_seq, out, w_hh, h0, c0, *given, own_vectors(weights))
            what, result = prepare_reverse(self._sweep(spec, inputs), *tensors)  # type: ignore[arg-type]
            try:
                launch(what)
            except LaunchRefused as refusal:
                result = self._smaller(refusal, spec, inputs, prepare_reverse, tensors)
            dx, dweights = gradients(spec, inputs, out, operand, result, needs)
        dh0, dc0 = (
            g.to(x.dtype) if need and g is not None else None
            for g, need in ((result.dh0, needs.h0), (result.dc0, needs.c0))
        )
        restarts = [
            None if g is None else g.sum(1).to(x.dtype)
            for g in (result.drestart_h, result.drestart_c)
        ]
        return InputGrads(dx, dh0, dc0, dweights, *restarts)

    def _sweep(self, spec: LayerSpec, inputs: LayerInputs) -> Sweep:
        """What both sweeps have in common."""
        layout, x = spec.layout, inputs.x
        return Sweep(
            kernel_cell(spec),
            DeviceLayout(layout.T, layout.B, x.shape[0], layout.offsets(x.device)),
            _REVERSE[: spec.directions],
            self.precision,
            self.plan,
            NONE if spec.options is None else sweep_options(spec, inputs.options),
            spec.heads,
        )

    def _smaller(
        self,
        refusal: LaunchRefused,
        spec: LayerSpec,
        inputs: LayerInputs,
        prepare: Callable[..., tuple[Launch, Result]],
        tensors: tuple[Any, ...],
    ) -> Result:
        """Run a sweep that the driver refused by a plan of fewer programs.

        Raises:
            RuntimeError: no plan has so few programs that the driver takes them.
        """
        chip = devices.kernel_device(inputs.x.device)
        assert chip is not None
        request, refused = plan_request(spec, inputs.x.dtype, self.precision), self.plan
        while True:
            devices.limit_programs(chip, refusal.programs)
            try:
                plan = plans.choose_plan(request, devices.device_limits(chip), chip)
            except DoesNotFit as reason:
                text = f"{refusal}; and no plan has fewer programs: {reason}"
                raise RuntimeError(text) from refusal
            if plan == refused:  # it is forced
                raise refusal
            what, result = prepare(self._sweep(spec, inputs)._replace(plan=plan), *tensors)
            try:
                launch(what)
                return result
            except LaunchRefused as another:
                refusal, refused = another, plan


def needs_gates(spec: LayerSpec) -> bool:
    """Whether backward needs the gates.

    A cell that does not keep them finds them in the output, except under zoneout.
    """
    zoned = spec.options is not None and spec.options.zoned
    return kernel_cell(spec).keeps_gates or zoned


def saves_operand(options: OptionTensors) -> bool:
    """Whether backward needs what the recurrent product took: it is not h0 and the output."""
    return any(t is not None for t in (options.lengths, options.reset, options.drop))


def sweep_options(spec: LayerSpec, options: OptionTensors) -> SweepOptions:
    """The options as the kernels take them."""
    assert spec.options is not None
    lengths, _, restart_h, restart_c, zone_h, zone_c, drop = options

    def bytes_of(mask: Tensor | None) -> Tensor | None:
        return None if mask is None else mask.contiguous().view(torch.uint8)

    return SweepOptions(
        lengths=None if lengths is None else lengths.clamp(0, spec.layout.T).to(torch.int32),
        reset=bytes_of(resets(spec, options)),
        restart_h=restart_h,
        restart_c=restart_c,
        zone_h=bytes_of(zone_h),
        zone_c=bytes_of(zone_c),
        zoneout=spec.options.zoneout if spec.options.zoned and zone_h is None else None,
        drop=drop,
        clip=spec.options.clip,
    )


def device_and_precision(x: Tensor, precision: Precision) -> AbstractContextManager[Any]:
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
