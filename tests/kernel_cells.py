"""Cells that only the kernels know, by their Triton functions, and a plain loop as their oracle."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_rnn.cells.builtin import CELLS
from fused_rnn.kernels.cell import CellFunctions, KernelCell
from fused_rnn.kernels.tiles import sigmoid, tanh
from fused_rnn.spec.layer import LayerInputs, LayerSpec, Outputs
from fused_rnn.spec.options import resets

# ---- sLSTM (arXiv 2405.04517): exponential gates, a normaliser n and a stabiliser m beside c -----


def slstm(gx: Tensor, gh: Tensor, states: Sequence[Tensor], vectors: Any) -> list[Tensor]:
    i, f, z, o = (gx + gh).chunk(4, -1)
    _, c, n, m = states
    forget = torch.nn.functional.logsigmoid(f) + m
    top = torch.maximum(i, forget)
    i, f = torch.exp(i - top), torch.exp(forget - top)
    c, n = f * c + i * torch.tanh(z), f * n + i
    return [torch.sigmoid(o) * c / n, c, n, top]


@triton.jit
def slstm_gates(i, f, m):
    """The stabilised gates, and the new m."""
    forget = tl.minimum(0.0, f) - tl.log(1.0 + tl.exp(-tl.abs(f))) + m
    top = tl.maximum(i, forget)
    return tl.exp(i - top), tl.exp(forget - top), top, i - forget


@triton.jit
def slstm_step(pre, state, params, H: tl.constexpr, FAST: tl.constexpr):
    i, f, m, _ = slstm_gates(pre[0], pre[1], state[3])
    z = tanh(pre[2], FAST)
    o = sigmoid(pre[3], FAST)
    c = f * state[1] + i * z
    n = f * state[2] + i
    return (pre[0], pre[1], z, o), (o * c / n, c, n, m)


@triton.jit
def slstm_others(saved, before, params, H: tl.constexpr, FAST: tl.constexpr):
    i, f, m, _ = slstm_gates(saved[0], saved[1], before[3])
    return f * before[1] + i * saved[2], f * before[2] + i, m


@triton.jit
def slstm_factors(saved, now, before, params, H: tl.constexpr, FAST: tl.constexpr):
    i, f, _, ahead = slstm_gates(saved[0], saved[1], before[3])
    z = saved[2]
    o = saved[3]
    c = f * before[1] + i * z  # not that of `now`, of which zoneout may have kept a part
    n = f * before[2] + i
    over = 1.0 / n
    by_c = over * o
    do = over * c * o * (1.0 - o)
    of_input = tl.where(ahead > 0, 1.0, 0.0)
    of_forget = tl.where(ahead > 0, 0.0, 1.0)
    slope = 1.0 - sigmoid(saved[1], False)
    return (
        -by_c * c * over, by_c, before[2] * f, before[1] * f, i, z * i, of_input, of_forget, slope,
        i * (1.0 - z * z), do, f,
    )  # fmt: skip


@triton.jit
def slstm_adjoint(k, grads, none, H: tl.constexpr):
    dh = grads[0]
    dn = grads[2] + dh * k[0]
    dc = grads[1] + dh * k[1]
    forget = dn * k[2] + dc * k[3]
    enter = dn * k[4] + dc * k[5]
    top = grads[3] - forget - enter
    dm = forget + top * k[7]
    return (
        (enter + top * k[6], dm * k[8], dc * k[9], dh * k[10]),
        (none, dc * k[11], dn * k[11], dm),
        (),
    )


def activate_slstm(slots: Tensor, before: Sequence[Tensor], vectors: Tensor | None) -> None:
    slots[..., 2].tanh_()
    slots[..., 3].sigmoid_()


# ---- an LSTM whose gates see c, by weights of each unit ------------------------------------------


def peephole(gx: Tensor, gh: Tensor, states: Sequence[Tensor], vectors: Any) -> list[Tensor]:
    i, f, g, o = (gx + gh).chunk(4, -1)
    c = states[1]
    new = torch.sigmoid(f + vectors[1] * c) * c
    new = new + torch.sigmoid(i + vectors[0] * c) * torch.tanh(g)
    return [torch.sigmoid(o + vectors[2] * new) * torch.tanh(new), new]


@triton.jit
def peephole_step(pre, state, params, H: tl.constexpr, FAST: tl.constexpr):
    i = sigmoid(pre[0] + params[0] * state[1], FAST)
    f = sigmoid(pre[1] + params[1] * state[1], FAST)
    g = tanh(pre[2], FAST)
    c = f * state[1] + i * g
    o = sigmoid(pre[3] + params[2] * c, FAST)
    return (i, f, g, o), (o * tanh(c, FAST), c)


@triton.jit
def peephole_others(saved, before, params, H: tl.constexpr, FAST: tl.constexpr):
    return (saved[1] * before[1] + saved[0] * saved[2],)


@triton.jit
def peephole_factors(saved, now, before, params, H: tl.constexpr, FAST: tl.constexpr):
    i, f, g, o = saved
    y = tanh(now[0], FAST)
    di = g * i * (1.0 - i)
    df = before[1] * f * (1.0 - f)
    do = y * o * (1.0 - o)
    by_c = o * (1.0 - y * y) + do * params[2]
    kept = f + di * params[0] + df * params[1]
    return di, df, i * (1.0 - g * g), do, by_c, kept, before[1], now[0]


@triton.jit
def peephole_adjoint(k, grads, none, H: tl.constexpr):
    dh = grads[0]
    dc = grads[1] + dh * k[4]
    di = dc * k[0]
    df = dc * k[1]
    do = dh * k[3]
    return (di, df, dc * k[2], do), (none, dc * k[5]), (di * k[6], df * k[6], do * k[7])


def activate_peephole(slots: Tensor, before: Sequence[Tensor], vectors: Tensor | None) -> None:
    assert vectors is not None
    c, v = before[1], vectors.to(before[1].dtype)
    slots[..., 0] = torch.sigmoid(slots[..., 0] + v[0] * c)
    slots[..., 1] = torch.sigmoid(slots[..., 1] + v[1] * c)
    slots[..., 2].tanh_()
    new = slots[..., 1] * c + slots[..., 0] * slots[..., 2]
    slots[..., 3] = torch.sigmoid(slots[..., 3] + v[2] * new)


# ---- one gate that is saved, since it is not the new h -------------------------------------------


def leaky(gx: Tensor, gh: Tensor, states: Sequence[Tensor], vectors: Any) -> list[Tensor]:
    return [states[0] + torch.sigmoid(vectors[0]) * (torch.tanh(gx + gh) - states[0])]


@triton.jit
def leaky_step(pre, state, params, H: tl.constexpr, FAST: tl.constexpr):
    y = tanh(pre[0], FAST)
    return (y,), (state[0] + sigmoid(params[0], FAST) * (y - state[0]),)


@triton.jit
def leaky_factors(saved, now, before, params, H: tl.constexpr, FAST: tl.constexpr):
    y = saved[0]
    rate = sigmoid(params[0], FAST)
    return rate * (1.0 - y * y), 1.0 - rate, (y - before[0]) * rate * (1.0 - rate)


@triton.jit
def leaky_adjoint(k, grads, none, H: tl.constexpr):
    return (grads[0] * k[0],), (grads[0] * k[1],), (grads[0] * k[2],)


def activate_leaky(slots: Tensor, before: Sequence[Tensor], vectors: Tensor | None) -> None:
    slots.tanh_()


# ---- an LSTM that passes h by: its adjoint needs both states before a step -----------------------


def highway(gx: Tensor, gh: Tensor, states: Sequence[Tensor], vectors: Any) -> list[Tensor]:
    i, f, g, o = (gx + gh).chunk(4, -1)
    c = torch.sigmoid(f) * states[1] + torch.sigmoid(i) * torch.tanh(g)
    o = torch.sigmoid(o)
    return [states[0] + o * (torch.tanh(c) - states[0]), c]


@triton.jit
def highway_step(pre, state, params, H: tl.constexpr, FAST: tl.constexpr):
    i = sigmoid(pre[0], FAST)
    f = sigmoid(pre[1], FAST)
    g = tanh(pre[2], FAST)
    o = sigmoid(pre[3], FAST)
    c = f * state[1] + i * g
    return (i, f, g, o), (state[0] + o * (tanh(c, FAST) - state[0]), c)


@triton.jit
def highway_factors(saved, now, before, params, H: tl.constexpr, FAST: tl.constexpr):
    i, f, g, o = saved
    y = tanh(now[0], FAST)
    di = g * i * (1.0 - i)
    df = before[1] * f * (1.0 - f)
    do = (y - before[0]) * o * (1.0 - o)
    return di, df, i * (1.0 - g * g), do, o * (1.0 - y * y), f, 1.0 - o


@triton.jit
def highway_adjoint(k, grads, none, H: tl.constexpr):
    dh = grads[0]
    dc = grads[1] + dh * k[4]
    return (dc * k[0], dc * k[1], dc * k[2], dh * k[3]), (dh * k[6], dc * k[5]), ()


def activate_highway(slots: Tensor, before: Sequence[Tensor], vectors: Tensor | None) -> None:
    candidate = torch.tanh(slots[..., 2])
    slots.sigmoid_()
    slots[..., 2] = candidate


SLSTM = CellFunctions(slstm_step, slstm_factors, slstm_adjoint, slstm_others)
PEEPHOLE = CellFunctions(peephole_step, peephole_factors, peephole_adjoint, peephole_others)

# ---- a cell of which zeros make no number --------------------------------------------------------


def ratio(gx: Tensor, gh: Tensor, states: Sequence[Tensor], vectors: Any) -> list[Tensor]:
    n = states[1].abs() + vectors[0].square()
    return [torch.tanh(gx + gh) / n, n]


@triton.jit
def ratio_step(pre, state, params, H: tl.constexpr, FAST: tl.constexpr):
    y = tanh(pre[0], FAST)
    n = tl.abs(state[1]) + params[0] * params[0]
    return (y,), (y / n, n)


@triton.jit
def ratio_others(saved, before, params, H: tl.constexpr, FAST: tl.constexpr):
    return (tl.abs(before[1]) + params[0] * params[0],)


@triton.jit
def ratio_factors(saved, now, before, params, H: tl.constexpr, FAST: tl.constexpr):
    y = saved[0]
    over = 1.0 / now[0]
    sign = tl.where(before[1] < 0, -1.0, 1.0)
    return (1.0 - y * y) * over, -y * over * over, sign, 2.0 * params[0]


@triton.jit
def ratio_adjoint(k, grads, none, H: tl.constexpr):
    dn = grads[1] + grads[0] * k[1]
    return (grads[0] * k[0],), (none, dn * k[2]), (dn * k[3],)


LEAKY = CellFunctions(leaky_step, leaky_factors, leaky_adjoint)
RATIO = CellFunctions(ratio_step, ratio_factors, ratio_adjoint, ratio_others)
HIGHWAY = CellFunctions(highway_step, highway_factors, highway_adjoint, peephole_others)
FOUR = (0, 1, 2, 3)
# The step of each cell, and how the kernels run it.
OWN: dict[str, tuple[Any, KernelCell]] = {
    "slstm": (
        slstm,
        KernelCell(
            "slstm", 4, FOUR, FOUR, lambda: SLSTM, activate_slstm, needs_h=False, factors=12
        ),
    ),
    "peephole": (
        peephole,
        KernelCell(
            "peephole", 2, FOUR, FOUR, lambda: PEEPHOLE, activate_peephole, parameters=3,
            needs_h=False, factors=8,
        ),
    ),
    "leaky": (
        leaky,
        KernelCell("leaky", 1, (0,), (0,), lambda: LEAKY, activate_leaky, 1, factors=3),
    ),
    "highway": (
        highway,
        KernelCell("highway", 2, FOUR, FOUR, lambda: HIGHWAY, activate_highway, factors=7),
    ),
    "ratio": (
        ratio,
        KernelCell(
            "ratio", 2, (0,), (0,), lambda: RATIO, activate_leaky, 1, needs_h=False, factors=4,
            masks_padding=True,
        ),
    ),
}  # fmt: skip


def show() -> None:
    """Let what looks for a cell by its name find these, to compile them."""
    shown: Any = {name: SimpleNamespace(kernels=kernels) for name, (_, kernels) in OWN.items()}
    CELLS.update(shown)


def dense(w_hh: Tensor) -> Tensor:
    """Recurrent weights of heads [k, G*H/k, H/k] as [G*H, H], zero outside of the heads."""
    k, _, H = w_hh.shape
    blocks = w_hh.unflatten(1, (-1, H))
    gates = [torch.block_diag(*blocks[:, g]) for g in range(blocks.shape[1])]
    return torch.cat(gates) if k > 1 else w_hh[0]


def loop(step: Any, spec: LayerSpec, inputs: LayerInputs) -> Outputs:
    """A layer step by step, of any number of states."""
    x, h0, c0, weights, options = inputs
    H, reset, found = spec.hidden_size, resets(spec, options), []
    how = spec.options
    split = spec.layout.split
    for d, w in enumerate(weights):

        def mine(h: Tensor | None, c: Tensor | None, d: int = d) -> list[Any]:
            """What belongs to each state of this direction."""
            first = [None if h is None else h[d]]
            return first + ([] if c0 is None else [None] * (c0.shape[-1] // H) if c is None
                            else list(c[d].split(H, -1)))  # fmt: skip

        def zones(zone: Tensor | None, d: int = d) -> Tensor | None:
            return None if zone is None else zone.unflatten(1, (spec.directions, -1)).movedim(1, 0)

        states, restart = mine(h0, c0), mine(options.restart_h, options.restart_c)
        zone = mine(zones(options.zone_h), zones(options.zone_c))
        gx = split(torch.nn.functional.linear(x, w.w_ih, w.b_ih))
        w_hh = dense(w.w_hh) if w.w_hh.dim() == 3 else w.w_hh
        rows: list[list[Tensor]] = [[] for _ in states]
        order = range(spec.layout.T)
        for t in reversed(order) if d == 1 else order:
            n = gx[t].shape[0]
            running = [s[:n] for s in states]
            begin = running
            if reset is not None:
                anew = split(reset[d])[t][:, None]
                begin = [
                    torch.where(anew, s.new_zeros(()) if r is None else r, s)
                    for s, r in zip(begin, restart, strict=True)
                ]
            if how is not None and how.clip is not None:
                begin = [s * 1 for s in begin]
                for s in begin:
                    s.register_hook(lambda g: g.clamp(-how.clip, how.clip))  # type: ignore[union-attr]
            operand = begin[0] if options.drop is None else begin[0] * options.drop[d, :n]
            gh = torch.nn.functional.linear(operand, w_hh, w.b_hh)
            new = step(gx[t], gh, begin, w.vectors)
            if how is not None and how.zoned:
                for i, z in enumerate(zone):
                    if z is None:
                        new[i] = how.zoneout * begin[i] + (1 - how.zoneout) * new[i]
                    else:
                        new[i] = torch.where(split(z)[t], begin[i], new[i])
            after = new
            if options.lengths is not None:
                on = (t < options.lengths)[:, None]
                after = [torch.where(on, s, r) for s, r in zip(new, running, strict=True)]
                new = [torch.where(on, s, 0.0) for s in new]
            states = [torch.cat([s, old[n:]]) for s, old in zip(after, states, strict=True)]
            for row, s in zip(rows, new, strict=True):
                row.append(s)
        sequences = [torch.cat(row[::-1] if d == 1 else row) for row in rows]
        found.append((sequences[0], states[0], sequences[1:], states[1:]))
    outs, h_n, others, finals = zip(*found, strict=True)
    c_n = torch.stack([torch.cat(f, -1) for f in finals]) if finals[0] else None
    c_seq = torch.cat([torch.cat(o, -1) for o in others], -1) if others[0] else None
    return Outputs(torch.cat(outs, 1), torch.stack(h_n), c_n, c_seq)
