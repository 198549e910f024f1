"""The recurrence of one layer in fp64, and both sweep kernels compared with it."""

import itertools
from dataclasses import replace

import torch
from helpers import assert_close, plan_request

from fused_rnn.cells import builtin as cells
from fused_rnn.kernels.chips import LIMITS
from fused_rnn.kernels.planner import make_plan
from fused_rnn.kernels.sweep import DeviceLayout, Sweep
from fused_rnn.kernels.sweeps import forward_sweep, reverse_sweep

CELLS = {c.name: c for c in (cells.RNN_TANH, cells.RNN_RELU, cells.GRU, cells.LSTM)}
# Largest error over the largest value of the reference. 16-bit: h is rounded once per step, the
# gates and their gradients once each.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
TF32_TOLERANCE = 1.5e-3  # operands are rounded to as many bits as fp16 has, states are not
LENGTHS = {
    1: [2],
    3: [7, 7, 2],
    8: [5, 5, 5, 4, 3, 3, 1, 1],
    9: [3, 3, 3, 2, 2, 2, 2, 1, 1],
    17: [7] * 8 + [6] * 3 + [3] * 5 + [1],
}


def make_layout(T, B, packed):
    """The layout, and the number of sequences that are running at each step."""
    if not packed:
        return DeviceLayout(T, B, T * B), [B] * T
    lengths = LENGTHS[B]
    sizes = [sum(n > t for n in lengths) for t in range(lengths[0])]
    offsets = torch.tensor([0, *itertools.accumulate(sizes)])
    return DeviceLayout(lengths[0], B, sum(sizes), offsets), sizes


class Problem:
    """One layer's recurrence with random numbers, and what the fp64 loop makes of it."""

    def __init__(self, name, dtype, H, B, T, reverse=(False,), packed=False):
        self.cell, self.name, self.dtype = CELLS[name], name, dtype
        self.H, self.reverse = H, reverse
        self.layout, self.sizes = make_layout(T, B, packed)
        torch.manual_seed(H * 1000 + B * 10 + T)
        D, N, G = len(reverse), self.layout.N, self.cell.blocks

        def random(*shape, scale=1.0):
            return (torch.randn(shape) * scale).to(dtype).double().requires_grad_()

        self.gx = random(D, N, G * H)
        self.w = random(D, G * H, H, scale=0.5 * H**-0.5)
        self.bias = random(D, H)
        self.h0 = random(D, B, H)
        self.c0 = random(D, B, H) if self.cell.has_c else None
        self.gh = torch.zeros(D, N, G * H, dtype=torch.float64, requires_grad=True)
        self._run()

    def _run(self):
        outs, cs, h_n, c_n = [], [], [], []
        for d, reverse in enumerate(self.reverse):
            out, c_seq = [None] * self.layout.T, [None] * self.layout.T
            h, c = self.h0[d], None if self.c0 is None else self.c0[d]
            for t in reversed(range(self.layout.T)) if reverse else range(self.layout.T):
                n = self.sizes[t]  # the first n sequences are running
                at = slice(sum(self.sizes[:t]), sum(self.sizes[: t + 1]))
                gh = h[:n] @ self.w[d].T + self.gh[d, at]
                if self.name == "gru":
                    gh = gh + torch.cat([torch.zeros(2 * self.H), self.bias[d]])
                if self.name == "rnn_relu":  # keep off its kink, where rounding decides the slope
                    gx = self.gx.data[d, at]
                    near = (gx + gh.detach()).abs() < 0.05
                    gx.copy_((gx + 0.25 * near).to(self.dtype))
                before = [h[:n]] if c is None else [h[:n], c[:n]]
                out[t], *others = self.cell.one_step(self.gx[d, at], gh, before)
                c_seq[t] = others[0] if others else None
                h = torch.cat([out[t], h[n:]])
                c = None if c is None else torch.cat([c_seq[t], c[n:]])
            outs.append(torch.cat(out))
            h_n.append(h)
            if self.cell.has_c:
                cs.append(torch.cat(c_seq))
                c_n.append(c)
        self.out, self.h_n = torch.cat(outs, 1), torch.stack(h_n)
        self.c_seq = torch.cat(cs, 1) if cs else None
        self.c_n = torch.stack(c_n) if c_n else None

    def slots(self, x):
        """[D, N, G * H] of the reference as [D, N, H, S], NaN where a slot is unused."""
        x = x.unflatten(-1, (self.cell.blocks, self.H)).transpose(-1, -2)
        if self.cell.blocks == 3:
            x = torch.cat([x, torch.full_like(x[..., :1], torch.nan)], -1)
        return x.detach()

    def gradients(self, use_c_seq):
        """Random gradients of the outputs; the reference's dgates, dh0, dc0."""
        outputs = [self.out, self.h_n] + ([self.c_n, self.c_seq] if self.cell.has_c else [])
        torch.manual_seed(0)
        d = [torch.randn(o.shape).to(self.dtype).double() for o in outputs]
        if self.cell.has_c and not use_c_seq:
            d[3].zero_()
        wanted = [self.gx, self.gh, self.h0] + ([self.c0] if self.cell.has_c else [])
        dgx, dgh, dh0, *dc0 = torch.autograd.grad(outputs, wanted, d, retain_graph=True)
        dgates = self.slots(dgx)
        if self.cell.blocks == 3:
            dgates[..., 3] = self.slots(dgh)[..., 2]
        return d, {"dgates": dgates, "dh0": dh0, **({"dc0": dc0[0]} if dc0 else {})}

    def to(self, x, dtype=None):
        return None if x is None else x.detach().to(dtype or self.dtype).contiguous()


def group_plan(p: Problem, block_h=16, block_k=32, **parts):
    """A plan with these parts for a group; all weights in registers, if `parts` do not say other.

    Made by hand, small sizes meet what the planner gives to large ones.
    """
    chunks = 0 if parts.get("regime") == "streamed" else -(-p.H // block_k)
    request = plan_request(p.name, p.H, p.dtype, 1, len(p.reverse), fast=False)
    plan = make_plan(request, LIMITS[80])
    plan = replace(plan, regime="cooperative", block_h=block_h, block_k=block_k, block_b=8)
    plan = replace(plan, programs=-(-p.H // block_h), chunks=chunks, k_split=1, m_split=1, tiles=0)
    return replace(plan, **parts)


def check_sweeps(p: Problem, plan, precision, use_c_seq, saves=(False, True)):
    """Both sweeps against the reference; what they found and what they should, by name."""
    D = len(p.reverse)
    tolerance = TF32_TOLERANCE if precision == "tf32" else TOLERANCE[p.dtype]
    sweep = Sweep(p.cell.kernels, p.layout, p.reverse, precision, plan)
    w, bias = p.to(p.w), p.to(p.bias) if p.name == "gru" else None
    h0, c0 = p.to(p.h0), p.to(p.c0, torch.float32)
    want = {"out": p.out, "h_n": p.h_n}
    if p.cell.has_c:
        want |= {"c_n": p.c_n, "c_seq": p.c_seq}
    for save in saves:
        gates = p.to(p.slots(p.gx))
        before = gates.clone()
        out = torch.full((p.layout.N, D * p.H), torch.nan, dtype=p.dtype)
        h_n, c_n, c_seq, _ = forward_sweep(sweep, gates, w, bias, h0, c0, out, save=save)
        if not save:
            assert c_seq is None
            assert torch.equal(gates.nan_to_num(), before.nan_to_num())
        got = {"out": out, "h_n": h_n, "c_n": c_n, "c_seq": c_seq}
        got = {name: x for name, x in got.items() if x is not None}
        for name, x in got.items():
            assert_close(x, want[name], name, of_largest=tolerance)

    d, gradients = p.gradients(use_c_seq)
    saved = [None if x is None else x.clone() for x in (gates, c_seq, out)]
    d = [p.to(x) for x in d] + [None] * 2
    dgates, dh0, dc0, *_ = reverse_sweep(
        sweep, gates, c_seq, out, w, h0, c0, d[0], d[1], d[2], d[3] if use_c_seq else None
    )
    got |= {"dgates": dgates, "dh0": dh0} | ({"dc0": dc0} if p.cell.has_c else {})
    for name, x in gradients.items():
        assert_close(got[name], x, name, of_largest=tolerance)
    for x, kept in zip((gates, c_seq, out), saved, strict=True):
        assert x is None or torch.equal(x, kept), "a saved tensor was modified"
    return got, want | gradients
