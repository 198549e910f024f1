"""The compiled forms of the sweeps: by plan, cell and size, each made once."""

from typing import Any

from triton.backends.compiler import GPUTarget

from fused_rnn.kernels.backward import backward_kernel
from fused_rnn.kernels.cell import CellFunctions
from fused_rnn.kernels.forward import forward_kernel
from fused_rnn.kernels.group import launch_options, sweep_constants
from fused_rnn.kernels.launch import Variant
from fused_rnn.kernels.precision import ROUNDED, SPLIT
from fused_rnn.kernels.sweep import Sweep

VARIANTS: dict[Any, tuple[CellFunctions, Variant]] = {}


def forward_variant(sweep: Sweep, H: int, save: bool, target: GPUTarget | None) -> Variant:
    """The forward sweep with H hidden units of a head, for a target where it depends on that."""
    cell, _, reverse, precision, plan, *_ = sweep
    key = (plan, cell, len(reverse), sweep.heads, H, save, precision, target)
    functions, known = cell.functions(), VARIANTS.get(key)
    if known is not None and known[0] is functions and known[1].kernel is forward_kernel:
        return known[1]
    constants = sweep_constants(plan, len(reverse) * sweep.heads, target) | {
        "STEP": functions.step,
        **_of_cell(sweep),
        "H": H,
        "SAVE": save,
        "KS": plan.k_split,
        "MS": plan.m_split,
        "JOINED": plan.joined,
        "PRECISION": _precision(sweep, target),
    }
    variant = Variant(forward_kernel, constants, launch_options(plan))
    VARIANTS[key] = functions, variant
    return variant


def reverse_variant(sweep: Sweep, H: int, target: GPUTarget | None) -> Variant:
    """The reverse sweep with H hidden units of a head, for a target where it depends on that."""
    cell, _, reverse, precision, plan, *_ = sweep
    key = (plan, cell, len(reverse), sweep.heads, H, precision, target)
    functions, known = cell.functions(), VARIANTS.get(key)
    if known is not None and known[0] is functions and known[1].kernel is backward_kernel:
        return known[1]
    # As many programs' partial sums at a time as fill the threads with 16 bytes each.
    together = (256 if plan.joined else 128) * plan.warps // (plan.block_h * plan.block_b)
    constants = sweep_constants(plan, len(reverse) * sweep.heads, target) | {
        "FACTORS": functions.factors,
        "ADJOINT": functions.adjoint,
        "OTHERS": functions.others,
        **_of_cell(sweep),
        "NEEDS_H": cell.needs_h,
        "H": H,
        "MS": plan.k_split * plan.m_split,
        "JOINED": plan.joined,
        "TOGETHER": max(1, min(8, together)),
        "PRECISION": _precision(sweep, target),
    }
    variant = Variant(backward_kernel, constants, launch_options(plan))
    VARIANTS[key] = functions, variant
    return variant


def _precision(sweep: Sweep, target: GPUTarget | None) -> str:
    """That of products: NVIDIA's tensor cores take fp32 rounded, or in parts."""
    if target is None or target.backend != "cuda":
        return sweep.precision
    if sweep.precision == "tf32":
        return ROUNDED.value
    return "ieee" if sweep.plan.regime == "streamed" else SPLIT.value


def _of_cell(sweep: Sweep) -> dict[str, Any]:
    cell = sweep.cell
    return {
        "G": cell.gates,
        "STATES": cell.states,
        "P": cell.parameters,
        "KEEPS": cell.keeps_gates,
        "MASKS": cell.masks_padding,
        "HEADS": sweep.heads,
    }
