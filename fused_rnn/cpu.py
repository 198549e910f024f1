"""The CPU engine: hand-written BPTT with as few PyTorch calls per time step as possible.

At the sizes that run on a CPU, a step is one small matrix product and a handful of calls, and the
calls are what torch.nn's own loop, with autograd's records of each, loses its time to in training.
See :mod:`fused_rnn.cpu_sweep`.
"""

import torch
from torch import Tensor

from fused_rnn.cpu_cells import SWEEPS
from fused_rnn.problem import Grads, Layer, OutputGrads, Outputs, Saved, Specs

CELLS = frozenset(SWEEPS)  # by name


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """16-bit types run in fp32: accurate, and faster on CPUs without 16-bit matrix units."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def forward(layer: Layer, inputs: Saved, save: bool) -> tuple[Outputs, Saved]:
    """See :class:`fused_rnn.problem.Engine`."""
    dtype, (x, h0, c0, *flat) = _cast(inputs)
    R = h0.shape[-1]
    out = x.new_empty(layer.rows.N, layer.directions * R)
    h_n, c_n = torch.empty_like(h0), None if c0 is None else torch.empty_like(c0)
    saved: list[Tensor | None] = []
    for d, w in enumerate(layer.unflatten(flat)):
        sweep = SWEEPS[layer.cell.name](
            layer=layer,
            reverse=d == 1,
            x=x,
            h0=h0[d],
            c0=None if c0 is None else c0[d],
            w=w,
            out=out[:, d * R : (d + 1) * R],
        )
        saved += sweep.forward(h_n[d], None if c_n is None else c_n[d], save)
    outputs = Outputs(out.to(dtype), h_n.to(dtype), None if c_n is None else c_n.to(dtype))
    return outputs, tuple(saved) if save else ()


def saved_specs(layer: Layer, inputs: Saved) -> Specs:
    """See :class:`fused_rnn.problem.Engine`."""
    x, w_hh = inputs[0], inputs[4]
    assert x is not None
    assert w_hh is not None
    H = w_hh.shape[0] // layer.cell.gates
    shapes = SWEEPS[layer.cell.name].saved_shapes(layer, x.shape[0], H)
    dtype = compute_dtype(x.dtype)
    return tuple([None if s is None else (s, dtype) for s in shapes]) * layer.directions


def backward(
    layer: Layer,
    inputs: Saved,
    out: Tensor,
    saved: Saved,
    grads: OutputGrads,
    needs: tuple[bool, ...],
) -> Grads:
    """See :class:`fused_rnn.problem.Engine`."""
    dtype, (x, h0, c0, *flat) = _cast(inputs)
    out = out.to(x.dtype)
    dout, dh_n, dc_n = (None if g is None else g.to(x.dtype) for g in grads[:3])
    R, per_direction = h0.shape[-1], len(saved) // layer.directions
    dx = torch.empty_like(x) if needs[0] else None
    dh0, dc0 = torch.zeros_like(h0), None if c0 is None else torch.zeros_like(c0)
    if dh_n is not None:
        dh0.copy_(dh_n)
    if dc0 is not None and dc_n is not None:
        dc0.copy_(dc_n)
    dflat: list[Tensor | None] = []
    for d, w in enumerate(layer.unflatten(flat)):
        columns = slice(d * R, (d + 1) * R)
        sweep = SWEEPS[layer.cell.name](
            layer=layer,
            reverse=d == 1,
            x=x,
            h0=h0[d],
            c0=None if c0 is None else c0[d],
            w=w,
            out=out[:, columns],
        )
        dflat += sweep.backward(
            saved[d * per_direction : (d + 1) * per_direction],
            None if dout is None else dout[:, columns],
            dh0[d],
            None if dc0 is None else dc0[d],
            dx,
            needs[3 + d * len(w) : 3 + (d + 1) * len(w)],
        )
    result = (dx, dh0 if needs[1] else None, dc0 if needs[2] else None, *dflat)
    return tuple(None if g is None else g.to(dtype) for g in result)


def _cast(inputs: Saved) -> tuple[torch.dtype, list[Tensor]]:
    """The inputs' type, and the inputs (absent ones stay None) in the type that is computed in."""
    assert inputs[0] is not None
    dtype = inputs[0].dtype
    cast = [t if t is None else t.to(compute_dtype(dtype)) for t in inputs]
    return dtype, cast  # type: ignore[return-value]
