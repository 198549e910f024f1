"""The CPU engine: both sweeps with as few PyTorch calls per time step as possible.

At the sizes that run on a CPU, a step is one small matrix product and a handful of calls, and the
calls are what torch.nn's own loop, with autograd's records of each, loses its time to in training.
See :mod:`fused_rnn.engines.cpu.sweep`.
"""

import torch
from torch import Tensor

from fused_rnn.engines.cpu.sweep import Sweep
from fused_rnn.spec.layer import (
    InputGrads,
    LayerInputs,
    LayerSpec,
    Needs,
    OutputGrads,
    Outputs,
    Saved,
    Specs,
    WeightGrads,
)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """16-bit types run in fp32: accurate, and faster on CPUs without 16-bit matrix units."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def forward(spec: LayerSpec, inputs: LayerInputs, save: bool) -> tuple[Outputs, Saved]:
    """Run the layer; saves the gates and c of all steps, with ``recompute`` c alone.

    See :class:`fused_rnn.spec.layer.Engine`.
    """
    dtype, wide = inputs.x.dtype, _widened(inputs)
    x, h0, c0, *_ = wide
    R = h0.shape[-1]
    out = x.new_empty(spec.layout.N, spec.directions * R)
    h_n, c_n = torch.empty_like(h0), None if c0 is None else torch.empty_like(c0)
    saved: list[Tensor | None] = []
    for d in range(spec.directions):
        sweep = _sweep(spec, wide, d, out[:, d * R : (d + 1) * R])
        saved += sweep.forward(h_n[d], None if c_n is None else c_n[d], save)
    outputs = Outputs(out.to(dtype), h_n.to(dtype), None if c_n is None else c_n.to(dtype))
    return outputs, tuple(saved) if save else ()


def saved_specs(spec: LayerSpec, inputs: LayerInputs) -> Specs:
    """Of the gates and c of each direction, see :class:`fused_rnn.spec.layer.Engine`."""
    shapes = Sweep.saved_shapes(spec, inputs.x.shape[0])
    dtype = compute_dtype(inputs.x.dtype)
    return tuple([None if s is None else (s, dtype) for s in shapes]) * spec.directions


def backward(
    spec: LayerSpec,
    inputs: LayerInputs,
    out: Tensor,
    saved: Saved,
    grads: OutputGrads,
    needs: Needs,
) -> InputGrads:
    """The reverse sweep, direction by direction; see :class:`fused_rnn.spec.layer.Engine`."""
    dtype, wide = inputs.x.dtype, _widened(inputs)
    x, h0, c0, *_ = wide
    out = out.to(x.dtype)
    dout, dh_n, dc_n = (None if g is None else g.to(x.dtype) for g in grads[:3])
    R, per_direction = h0.shape[-1], len(saved) // spec.directions
    dx = torch.empty_like(x) if needs.x else None
    dh0, dc0 = torch.zeros_like(h0), None if c0 is None else torch.zeros_like(c0)
    if dh_n is not None:
        dh0.copy_(dh_n)
    if dc0 is not None and dc_n is not None:
        dc0.copy_(dc_n)
    weights = []
    for d, wanted in enumerate(needs.weights):
        columns = slice(d * R, (d + 1) * R)
        dw = _sweep(spec, wide, d, out[:, columns]).backward(
            saved[d * per_direction : (d + 1) * per_direction],
            None if dout is None else dout[:, columns],
            dh0[d],
            None if dc0 is None else dc0[d],
            dx,
            wanted,
        )
        weights.append(WeightGrads._make([None if g is None else g.to(dtype) for g in dw]))
    return InputGrads(
        None if dx is None else dx.to(dtype),
        dh0.to(dtype) if needs.h0 else None,
        dc0.to(dtype) if needs.c0 and dc0 is not None else None,
        tuple(weights),
    )


def _sweep(spec: LayerSpec, inputs: LayerInputs, d: int, out: Tensor) -> Sweep:
    """The sweep of direction ``d``, whose output is ``out`` [N, R]."""
    x, h0, c0, weights, _ = inputs
    c = None if c0 is None else c0[d]
    return Sweep(spec=spec, reverse=d == 1, x=x, h0=h0[d], c0=c, w=weights[d], out=out)


def _widened(inputs: LayerInputs) -> LayerInputs:
    """The inputs in the type that is computed in."""
    dtype = compute_dtype(inputs.x.dtype)
    return inputs if dtype == inputs.x.dtype else inputs.map(lambda t: t.to(dtype))
