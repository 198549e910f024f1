"""The two sweeps of a layer, from tensors to launches.

`prepare_forward` and `prepare_reverse` allocate what a sweep writes and say what is to be launched;
`forward_sweep` and `reverse_sweep` launch it, too.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget

from fused_rnn.kernels.group import compile_target
from fused_rnn.kernels.launch import Launch, launch
from fused_rnn.kernels.plan import Plan
from fused_rnn.kernels.sweep import Sweep
from fused_rnn.kernels.variants import forward_variant, reverse_variant


class ForwardResult(NamedTuple):
    """What a forward sweep returns beside what it overwrites.

    Attributes:
        h_n: [D, B, H] in the dtype of out.
        c_n: [D, B, H] in the dtype of out, or None for a cell without c.
        c_seq: c after every step [N, D * H] in fp32, if it was saved or wanted.
        operand: what the recurrent product of each step took [N, D * H], if not h0 or out.
    """

    h_n: Tensor
    c_n: Tensor | None
    c_seq: Tensor | None
    operand: Tensor | None


class Gradients(NamedTuple):
    """What a reverse sweep finds; all but dgates in fp32.

    Attributes:
        dgates: [D, N, H, S] in the dtype of the weights, by slots.
        dh0: [D, B, H].
        dc0: [D, B, H], or None for a cell without c.
        drestart_h: [D, B, H], with a restart state.
        drestart_c: [D, B, H], with a restart state of a cell with c.
    """

    dgates: Tensor
    dh0: Tensor
    dc0: Tensor | None
    drestart_h: Tensor | None
    drestart_c: Tensor | None


def forward_sweep(
    sweep: Sweep,
    gates: Tensor,
    weight_hh: Tensor,
    bias_hn: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    out: Tensor,
    *,
    save: bool,
    cells: bool = False,
) -> ForwardResult:
    """Run the recurrence of one layer; arguments as of `prepare_forward`."""
    what, result = prepare_forward(
        sweep, gates, weight_hh, bias_hn, h0, c0, out, save=save, cells=cells
    )
    launch(what)
    return result


def reverse_sweep(
    sweep: Sweep,
    gates: Tensor | None,
    c_seq: Tensor | None,
    out: Tensor,
    weight_hh: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    dout: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dc_seq: Tensor | None = None,
) -> Gradients:
    """Back-propagate through the recurrence of one layer; arguments as of `prepare_reverse`."""
    grads = dout, dh_n, dc_n, dc_seq
    what, result = prepare_reverse(sweep, gates, c_seq, out, weight_hh, h0, c0, *grads)
    launch(what)
    return result


def prepare_forward(
    sweep: Sweep,
    gates: Tensor,
    weight_hh: Tensor,
    bias_hn: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    out: Tensor,
    save: bool,
    cells: bool = False,
    target: GPUTarget | None = None,
) -> tuple[Launch, ForwardResult]:
    """What is to be launched for the recurrence of one layer, and what it will fill.

    Args:
        sweep: the layer.
        gates: [D, N, H, S] input part of the pre-activations with all biases but bias_hn, the slots
            fastest. With save it is overwritten by what the step saves, see `cell.py`.
        weight_hh: [D, G * H, H] in torch's order, in the dtype of gates.
        bias_hn: [D, H], of a gate whose recurrent part has a slot of its own (n of a GRU).
        h0: [D, B, H].
        c0: [D, B, H], or None for a cell without c.
        out: [N, D * H], written.
        save: whether a reverse sweep will follow.
        cells: whether c of all steps is wanted without save, too.
        target: what is compiled for; by default the current device.
    """
    _, layout, _, _, plan, options = sweep
    D, N, H, _ = gates.shape
    h_n = out.new_empty(D, layout.B, H)
    c_n = c_seq = operand = None
    if sweep.cell.states == 2:
        c_n = torch.empty_like(h_n)
        if save or cells:
            c_seq = sweep.empty(N, D * H, dtype=torch.float32, like=out)
    group, ragged = plan.programs > 1, layout.offsets is not None
    if (options.operand_differs and (save or group)) or (ragged and group):
        operand = sweep.empty(N, D * H, dtype=out.dtype, like=out)
    if options.lengths is not None:
        out.zero_()
    tensors = {
        "gates": gates,
        "w": weight_hh,
        "bias": bias_hn,
        "h0": h0,
        "c0": c0,
        "out": out,
        "h_n": h_n,
        "c_n": c_n,
        "c_seq": c_seq,
        "operand_seq": operand,
        **options.tensors(restart_h=options.restart_h, restart_c=options.restart_c),
        "offsets": layout.offsets,
        "counters": None,
    }
    numbers = {"zoneout": options.zoneout, "scale": 1.0} | sweep.numbers()
    variant = forward_variant(sweep, H, save, _target(plan, out, target))
    result = ForwardResult(h_n, c_n, c_seq, operand)
    return Launch(variant, plan, D, out.device, tensors, numbers), result


def prepare_reverse(
    sweep: Sweep,
    gates: Tensor | None,
    c_seq: Tensor | None,
    out: Tensor,
    weight_hh: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    dout: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dc_seq: Tensor | None = None,
    *,
    target: GPUTarget | None = None,
) -> tuple[Launch, Gradients]:
    """What is to be launched to go back through a recurrence, and what it will fill.

    Args:
        sweep: the layer, as in the forward sweep.
        gates: as the forward sweep left them; None for one slot without zoneout. Not modified.
        c_seq: c after every step [N, D * H], or None for a cell without c.
        out: [N, D * H].
        weight_hh: as in the forward sweep.
        h0: [D, B, H].
        c0: [D, B, H], or None for a cell without c.
        dout: gradient of out [N, D * H], or None for zeros.
        dh_n: gradient of h_n [D, B, H], or None for zeros.
        dc_n: gradient of c_n [D, B, H], or None for zeros.
        dc_seq: gradient of c_seq [N, D * H], or None for zeros.
        target: what is compiled for; by default the current device.
    """
    cell, layout, _, _, plan, options = sweep
    D, _, H = weight_hh.shape
    states, initial, restart = out, h0, options.restart_h
    if cell.states == 2:
        states, initial, restart = c_seq, c0, options.restart_c  # type: ignore[assignment]
    initial, restart = (  # read in the type of states, where the state before a step is needed
        None if t is None or cell.slots == 1 else t.to(states.dtype) for t in (initial, restart)
    )
    result = _gradients(sweep, D, H, weight_hh.dtype, out)
    tensors = {
        "gates": gates if cell.slots == 4 or options.zoned else None,
        "w": weight_hh,
        "states": states,
        "initial": initial,
        "dout": dout,
        "dc_seq": dc_seq,
        "dh_n": dh_n,
        "dc_n": dc_n,
        **result._asdict(),
        **options.tensors(restart=restart),
        "offsets": layout.offsets,
        "counters": None,
        "partials": _partials(plan, layout.B, D, out),
    }
    numbers = {"zoneout": options.zoneout, "clip": options.clip, "scale": 1.0, "zero": 0}
    numbers |= sweep.numbers()
    variant = reverse_variant(sweep, H, _target(plan, out, target))
    return Launch(variant, plan, D, out.device, tensors, numbers), result


def _gradients(sweep: Sweep, D: int, H: int, dtype: torch.dtype, like: Tensor) -> Gradients:
    """Memory for what the reverse sweep writes."""
    cell, options, (_, B, N, _) = sweep.cell, sweep.options, sweep.layout
    dgates = sweep.empty(D, N, H, cell.slots, dtype=dtype, like=like)
    dh0 = torch.empty(D, B, H, dtype=torch.float32, device=like.device)
    dc0 = torch.empty_like(dh0) if cell.states == 2 else None
    if options.reset is None or options.restart_h is None:
        return Gradients(dgates, dh0, dc0, None, None)
    drestart_c = None if dc0 is None else torch.empty_like(dc0)
    return Gradients(dgates, dh0, dc0, torch.empty_like(dh0), drestart_c)


def _partials(plan: Plan, B: int, D: int, like: Tensor) -> Tensor | None:
    """Memory through which the programs of a group exchange parts of dh."""
    if plan.programs == 1:
        return None
    groups = max(tiles * directions for _, tiles, _, directions in plan.launches(B, D))
    size = 2 * plan.programs**2 * plan.block_h * plan.block_b
    return torch.empty(groups * size, dtype=torch.float32, device=like.device)


def _target(plan: Plan, like: Tensor, target: GPUTarget | None) -> GPUTarget | None:
    """What a group is compiled for, on which its barrier depends; None for a single program."""
    if plan.programs == 1:
        return None
    return target or compile_target(like.device)
