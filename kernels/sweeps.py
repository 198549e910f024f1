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
from fused_rnn.kernels.sweep import Gradients, Sweep
from fused_rnn.kernels.variants import forward_variant, reverse_variant


class ForwardResult(NamedTuple):
    """What a forward sweep returns beside what it overwrites.

    Attributes:
        h_n: [D, B, H] in the dtype of out.
        c_n: [D, B, K * H] in the dtype of out, or None for a cell of one state.
        c_seq: c after every step [N, D * K * H] in fp32, if it was saved or wanted.
        operand: what the recurrent product of each step took [N, D * H], if not h0 or out.
    """

    h_n: Tensor
    c_n: Tensor | None
    c_seq: Tensor | None
    operand: Tensor | None


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
    vectors: Tensor | None = None,
) -> ForwardResult:
    """Run the recurrence of one layer; arguments as of `prepare_forward`."""
    what, result = prepare_forward(
        sweep, gates, weight_hh, bias_hn, h0, c0, out, save, cells, vectors
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
    vectors: Tensor | None = None,
) -> Gradients:
    """Back-propagate through the recurrence of one layer; arguments as of `prepare_reverse`."""
    grads = dout, dh_n, dc_n, dc_seq
    what, result = prepare_reverse(sweep, gates, c_seq, out, weight_hh, h0, c0, *grads, vectors)
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
    vectors: Tensor | None = None,
    target: GPUTarget | None = None,
    result: ForwardResult | None = None,
) -> tuple[Launch, ForwardResult]:
    """What is to be launched for the recurrence of one layer, and what it will fill.

    With ``k`` heads gates, weight_hh and bias_hn are those of ``D * k`` directions of ``H / k``
    units; all other tensors are those of D directions of H units.

    Args:
        sweep: the layer.
        gates: [D, N, H, S] input part of the pre-activations with all biases but bias_hn, the slots
            fastest. With save it is overwritten by what the step saves, see `cell.py`.
        weight_hh: [D, G * H, H] in torch's order, in the dtype of gates.
        bias_hn: [D, H], of a gate whose recurrent part has a slot of its own (n of a GRU).
        h0: [D, B, H], in the dtype of gates or fp32.
        c0: [D, B, K * H], all states beside h one after the other; None for a cell of one state.
        out: [N, D * H], written.
        save: whether a reverse sweep will follow.
        cells: whether c of all steps is wanted without save, too.
        vectors: [D, P, H], the cell's own parameters.
        target: what is compiled for; by default the current device.
        result: memory to be filled; by default it is allocated.
    """
    D, N, H, _ = gates.shape
    result = result or _outputs(sweep, N, D // sweep.heads, H * sweep.heads, out, save, cells)
    tensors = {
        "gates": gates,
        "w": weight_hh,
        "bias": bias_hn,
        "vectors": vectors,
        "h0": h0,
        "c0": c0,
        "out": out,
        "h_n": result.h_n,
        "c_n": result.c_n,
        "c_seq": result.c_seq,
        "operand_seq": result.operand,
        **sweep.options.tensors(),
        "offsets": sweep.layout.offsets,
        "counters": None,
    }
    numbers = {"zoneout": sweep.options.zoneout, "scale": 1.0} | sweep.numbers()
    variant = forward_variant(sweep, H, save, _target(sweep, out, target))
    return Launch(variant, sweep.plan, D, out.device, tensors, numbers), result


def _outputs(
    sweep: Sweep, N: int, D: int, H: int, out: Tensor, save: bool, cells: bool
) -> ForwardResult:
    """Memory for what the forward sweep writes beside out, of D directions of H units."""
    B, K, plan, options = sweep.layout.B, sweep.cell.states - 1, sweep.plan, sweep.options
    c_n = c_seq = operand = None
    if K > 0:
        c_n = out.new_empty(D, B, K * H)
        if save or cells:
            c_seq = sweep.empty(N, D * K * H, dtype=torch.float32, like=out)
    group, ragged = plan.programs > 1, sweep.layout.offsets is not None
    if (options.operand_differs and (save or group)) or (ragged and group):
        operand = sweep.empty(N, D * H, dtype=out.dtype, like=out)
    if options.lengths is not None:
        out.zero_()
    return ForwardResult(out.new_empty(D, B, H), c_n, c_seq, operand)


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
    vectors: Tensor | None = None,
    *,
    target: GPUTarget | None = None,
    result: Gradients | None = None,
    partials: Tensor | None = None,
) -> tuple[Launch, Gradients]:
    """What is to be launched to go back through a recurrence, and what it will fill.

    Args:
        sweep: as in the forward sweep.
        gates: as the forward sweep left them, if it did. Not modified.
        c_seq: c after every step [N, D * K * H], or None for a cell of one state.
        out: [N, D * H].
        weight_hh: as in the forward sweep.
        h0: as in the forward sweep.
        c0: as in the forward sweep.
        dout: gradient of out [N, D * H], or None for zeros.
        dh_n: gradient of h_n [D, B, H], or None for zeros.
        dc_n: gradient of c_n [D, B, K * H], or None for zeros.
        dc_seq: gradient of c_seq [N, D * K * H], or None for zeros.
        vectors: as in the forward sweep.
        target: what is compiled for; by default the current device.
        result: memory to be filled; by default it is allocated.
        partials: of `partials_memory`; by default it is allocated.
    """
    cell, plan, options, (D, _, H) = sweep.cell, sweep.plan, sweep.options, weight_hh.shape
    keeps = cell.keeps_gates or options.zoned
    result = result or _gradients(sweep, D, H, weight_hh.dtype, out)
    tensors = {
        "gates": gates if keeps else None,
        "w": weight_hh,
        "vectors": vectors,
        "out": out if cell.needs_h or not keeps else None,
        "c_seq": c_seq,
        "h0": _like(h0, out) if cell.needs_h else None,
        "c0": _like(c0, c_seq),
        "dout": dout,
        "dc_seq": dc_seq,
        "dh_n": dh_n,
        "dc_n": dc_n,
        **result._asdict(),
        **_reverse_options(sweep, out, c_seq),
        "counters": None,
        "partials": partials_memory(plan, sweep.layout.B, D, out) if partials is None else partials,
    }
    numbers = {"zoneout": options.zoneout, "clip": options.clip, "scale": 1.0, "zero": 0}
    variant = reverse_variant(sweep, H, _target(sweep, out, target))
    return Launch(variant, plan, D, out.device, tensors, numbers | sweep.numbers()), result


def _reverse_options(sweep: Sweep, out: Tensor, c_seq: Tensor | None) -> dict[str, Tensor | None]:
    """The tensors of options and layout; states in the types of those of all steps."""
    options = sweep.options
    restart_h = _like(options.restart_h, out) if sweep.cell.needs_h else None
    restarts = {"restart_h": restart_h, "restart_c": _like(options.restart_c, c_seq)}
    return options.tensors() | restarts | {"offsets": sweep.layout.offsets}


def _like(state: Tensor | None, others: Tensor | None) -> Tensor | None:
    """A state in the type of those of all steps, among which the kernel selects it by address."""
    return None if state is None or others is None else state.to(others.dtype)


def _gradients(sweep: Sweep, D: int, H: int, dtype: torch.dtype, like: Tensor) -> Gradients:
    """Memory for what the reverse sweep writes; D and H of a head, as in `prepare_forward`."""
    cell, options, (_, B, N, _) = sweep.cell, sweep.options, sweep.layout
    dgates = sweep.empty(D, N, H, cell.slots, dtype=dtype, like=like)
    D, H, K = D // sweep.heads, H * sweep.heads, cell.states - 1

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=like.device)

    restarted = options.reset is not None and options.restart_h is not None
    tiles = -(-B // sweep.plan.block_b)
    return Gradients(
        dgates,
        empty(D, B, H),
        empty(D, B, K * H) if K else None,
        empty(D, B, H) if restarted else None,
        empty(D, B, K * H) if restarted and K else None,
        empty(D, tiles, cell.parameters, H) if cell.parameters else None,
    )


def partials_memory(plan: Plan, B: int, D: int, like: Tensor) -> Tensor | None:
    """Memory through which the programs of a group exchange parts of dh."""
    if plan.programs == 1:
        return None
    groups = max(tiles * directions for _, tiles, _, directions in plan.launches(B, D))
    size = 2 * plan.programs**2 * plan.block_h * plan.block_b
    # Those of wide batch tiles are rounded: half the bytes through L2, of which they have most.
    dtype = like.dtype if plan.joined else torch.float32
    return torch.empty(groups * size, dtype=dtype, device=like.device)


def _target(sweep: Sweep, like: Tensor, target: GPUTarget | None) -> GPUTarget | None:
    """What is compiled for, where more than Triton depends on it; else None.

    A group's barrier does, and what becomes of fp32 operands.
    """
    if sweep.plan.programs == 1 and like.dtype != torch.float32:
        return None
    return target or compile_target(like.device)
