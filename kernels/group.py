"""The barrier among the programs that share a batch tile, once per time step.

Everyone announces a step after writing what the others need of it, and waits until all have. An
announcement is a release, the wait acquires, and a thread block barrier beside each extends both to
all threads: what was stored before `arrive` is seen after `wait`, if it is not read through a stale
L1 line (fresh addresses, and `.cg` loads).

Steps take turns between two counters. A program can be two steps ahead of another's wait at no
time, so while somebody waits for a count, that count stays: it may be compared for equality, which
is what `tl.atomic_poll` does. One counter would run past a slow program's target.
"""

from typing import Any

import triton
import triton.language as tl

from fused_rnn.kernels.plan import Plan

LINE = tl.constexpr(32)  # int32 per counter: each has a line of 128 bytes to itself
POLL = tl.constexpr(hasattr(tl, "atomic_poll") and not triton.knobs.runtime.interpret)


@triton.jit
def arrive(counters, step):
    """Announce `step` (0, 1, 2, ...): all that this program has stored so far may be read."""
    tl.debug_barrier()
    tl.atomic_add(counters + (step % 2) * LINE, 1, sem="release", scope="gpu")


@triton.jit
def wait(counters, step, members):
    """Wait until all members of the group have announced `step`."""
    mine = counters + (step % 2) * LINE
    target = (step // 2 + 1) * members
    if POLL:
        tl.atomic_poll(mine, target, sem="acquire", scope="gpu")
    else:
        while tl.atomic_add(mine, 0, sem="acquire", scope="gpu") != target:
            pass
    tl.debug_barrier()


def sweep_constants(plan: Plan, D: int) -> dict[str, Any]:
    """The constexpr arguments that both sweeps take from a plan."""
    return {
        "D": D,
        "MEMBERS": plan.members,
        "BLOCK_H": plan.block_h,
        "BLOCK_K": plan.block_k,
        "BLOCK_B": plan.block_b,
        "REGISTERS": plan.chunks,
        "STREAM": plan.regime == "streamed",
        "FAST": plan.fast,
    }


def launch_options(plan: Plan) -> dict[str, Any]:
    """What the compiler is told beside the arguments."""
    options = {"num_warps": plan.warps, "num_stages": 1, "enable_fp_fusion": True}
    if plan.members > 1:
        options["launch_cooperative_grid"] = True
    return options
