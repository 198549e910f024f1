"""What a time step cannot be faster than, from the chip's published figures. Nothing is measured.

Three limits, of the time loops alone; the largest one binds:

    barrier   if a head's weights exceed one SM: h passes from SM to SM once per step and sweep
    tensor    the multiply-adds of the recurrent products, on the SMs that the plan uses
    l2        the bytes that the step moves through L2, on the same SMs
"""

from dataclasses import dataclass

from bench.cases import Case
from fused_rnn.cells.builtin import CELLS
from fused_rnn.kernels.cell import KernelCell
from fused_rnn.kernels.chips import Limits
from fused_rnn.kernels.plan import Plan

# Dense floating-point operations per SM and cycle in 16-bit types; TF32 has half of that. From the
# data sheets of A100, A40, L40S, H100 SXM, B200, RTX PRO 6000 Blackwell and MI300X: their peak
# over the number of SMs and the boost clock.
TENSOR: dict[int | str, int] = {
    80: 2048,
    86: 1024,
    89: 1024,
    90: 4096,
    100: 8192,
    120: 1024,
    "gfx942": 2048,
}
# The same without tensor cores: two for each fp32 lane of an SM (the same data sheets).
LANES: dict[int | str, int] = {80: 128}
OTHER_LANES = 256
L2_BYTES = 64  # per cycle from L2 to one SM, the peak (CUDA programming guides)
# Microseconds from a release to the acquire that sees it, through a counter in L2. H100: 0.651,
# from the hardware unit tests of the flash-vla project, and 0.63 to 0.96 as measured by ours; RTX
# 5090: 0.400, from a public note. For other chips nobody has published one, so that they have no
# such limit here.
HOP_US: dict[int | str, float] = {90: 0.651, 120: 0.400}
REGISTER_FILE = 256 * 1024  # bytes of one SM, on every chip of the table


@dataclass(frozen=True)
class Bounds:
    """Microseconds per time step that no implementation can beat."""

    barrier: float
    tensor: float
    l2: float

    @property
    def limit(self) -> str:
        """The name of the largest."""
        return max(("barrier", "tensor", "l2"), key=lambda name: float(getattr(self, name)))

    @property
    def us(self) -> float:
        """The largest."""
        return max(self.barrier, self.tensor, self.l2)

    def fraction(self, step_us: float) -> float:
        """Of the limit, what a step of so many microseconds achieves: 1 is the best possible."""
        return self.us / step_us


def kernel_cell(case: Case) -> KernelCell:
    """The case's cell as our kernels know it."""
    cell = CELLS[case.cell].kernels
    assert cell is not None
    return cell


def flops(case: Case, sweeps: int) -> float:
    """Floating-point operations of the recurrent products of a step, in 1 or 2 sweeps."""
    gates = kernel_cell(case).gates
    return sweeps * 2.0 * gates * case.H**2 * case.B * case.directions * case.heads


def l2_bytes(case: Case, sweeps: int, plan: Plan | None) -> float:
    """Bytes that a step moves through L2, at least.

    Gates in and h out; with 2 sweeps also what the forward one saves, the reverse one reads it or
    else h, and the gradients of h in and of the gates out. By a plan what a group exchanges, or
    streams.
    """
    cell, size = kernel_cell(case), case.torch_dtype.itemsize
    units = case.H * case.B * case.directions * case.heads
    total = units * size * (cell.gates + 1)
    if sweeps == 2:
        saved = size * (cell.slots if cell.keeps_gates else 0) + 4 * (cell.states - 1)
        h = size if cell.needs_h or not cell.keeps_gates else 0
        total += units * (2 * saved + h + size * (cell.gates + 1))
    if plan is not None and plan.programs > 1:
        total += units * plan.programs * (size + (sweeps - 1) * 8)  # h; fp32 sums out and in
        if plan.regime == "streamed":
            tiles = -(-case.B // plan.block_b) * case.directions * case.heads
            total += sweeps * tiles * cell.gates * case.H**2 * size
    return total


def bounds(case: Case, mode: str, limits: Limits, plan: Plan | None = None) -> Bounds:
    """The limits of a step on a chip.

    Args:
        case: what is run.
        mode: see `records.Line`; training has two sweeps.
        limits: the chip.
        plan: how our kernels run it. Without one, of others, the whole chip is taken to work.
    """
    sweeps = 2 if mode in ("train", "sweep_train") else 1
    cell, size = kernel_cell(case), case.torch_dtype.itemsize
    sms = limits.sms
    group = cell.gates * case.H**2 * size > limits.sm_shared + REGISTER_FILE
    if plan is not None:
        tiles = -(-case.B // plan.block_b)
        sms = min(sms, plan.programs * tiles * case.directions * case.heads)
        group = plan.programs > 1
    rate = TENSOR[limits.target] / (1 if size == 2 else 2)
    if case.dtype in ("fp32", "fp64"):
        rate = LANES.get(limits.target, OTHER_LANES)
    cycles_per_us = 1000 * limits.clock * sms
    return Bounds(
        barrier=sweeps * HOP_US.get(limits.target, 0.0) if group else 0.0,
        tensor=flops(case, sweeps) / (rate * cycles_per_us),
        l2=l2_bytes(case, sweeps, plan) / (L2_BYTES * cycles_per_us),
    )
