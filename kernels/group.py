"""The barrier among the programs that share a batch tile, once per time step.

Everyone announces a step after writing what the others need of it, and waits until all have. An
announcement is a release, the wait acquires, and a thread block barrier beside each extends both to
all threads: what was stored before `arrive` is seen after `wait`, if it is not read through a stale
L1 line (fresh addresses, and `.cg` loads). Since Triton 3.9 the compiler puts those block barriers
there by itself; before, `tl.debug_barrier` does. Whether it must is read off compiled code, see
`needs_block_barriers`.

Steps take turns between two counters. A program can be two steps ahead of another's wait at no
time, so while somebody waits for a count, that count stays: it may be compared for equality, which
is what `tl.atomic_poll` does. One counter would run past a slow program's target.
"""

import re
import warnings
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_rnn.kernels.plan import Plan

LINE = tl.constexpr(32)  # int32 per counter: each has a line of 128 bytes to itself
INTERPRETED = triton.knobs.runtime.interpret
POLL = tl.constexpr(hasattr(tl, "atomic_poll") and not INTERPRETED)


@triton.jit
def arrive(counters, step, BLOCK_BARRIER: tl.constexpr = True):
    """Announce `step` (0, 1, 2, ...): all that this program has stored so far may be read."""
    if BLOCK_BARRIER:
        tl.debug_barrier()
    tl.atomic_add(counters + (step % 2) * LINE, 1, sem="release", scope="gpu")


@triton.jit
def wait(counters, step, programs, BLOCK_BARRIER: tl.constexpr = True):
    """Wait until all programs of the group have announced `step`."""
    mine = counters + (step % 2) * LINE
    target = (step // 2 + 1) * programs
    if POLL:
        tl.atomic_poll(mine, target, sem="acquire", scope="gpu")
    else:
        while tl.atomic_add(mine, 0, sem="acquire", scope="gpu") != target:
            pass
    if BLOCK_BARRIER:
        tl.debug_barrier()


@triton.jit
def exchange(data, counters, step, programs):
    """A step of a group without block barriers of ours: compiled and looked at, never run."""
    at = data + tl.arange(0, 128)
    tl.store(at, step)
    arrive(counters, step, False)
    wait(counters, step, programs, False)
    tl.store(at + 256, tl.load(at + 128, cache_modifier=".cg"))


# A letter for each line of PTX that orders memory or accesses it; the first pattern that matches.
_LETTERS = {
    "b": r"bar(rier)?(\.cta)?\.sync(\.aligned)?\s+0;",  # of all threads: no predicate, no count
    "r": r".*\b(red|atom)\b.*\.(release|acq_rel)\b",
    "a": r".*(\.acquire|\bfence\.acq_rel)\b",
    "p": r".*\bld\.relaxed\b",  # a poll
    "s": r".*\bst\.global\b",
    "l": r".*\bld\.global\b",
    "?": r".*\b(bar|barrier|fence|membar|red|atom|ld\.(?!param)|st|cp|call|mbarrier)\b",
}


def memory_order(ptx: str) -> str:
    """The letters of all lines of a compiled kernel that order memory or access it."""
    lines = (line.strip() for line in ptx.splitlines())
    return "".join(
        next((letter for letter, pattern in _LETTERS.items() if re.match(pattern, line)), "")
        for line in lines
    )


def has_block_barriers(exchange_ptx: str) -> bool:
    """Whether one stands between the store and the release, and between the acquire and the load.

    Not if there is anything else than was expected.
    """
    return re.fullmatch("s+b+rp*ab+l+s+", memory_order(exchange_ptx)) is not None


@lru_cache
def needs_block_barriers(target: GPUTarget | None) -> bool:
    """Whether `arrive` and `wait` need block barriers of their own on this target.

    They do, unless `exchange`, compiled for it, has them all the same.
    """
    if target is None or target.backend != "cuda":
        return True
    types = {"data": "*i32", "counters": "*i32", "step": "i32", "programs": "i32"}
    options = {"num_warps": 4, "enable_fp_fusion": True}
    try:
        compiled = triton.compile(ASTSource(exchange, types), target=target, options=options)
        return not has_block_barriers(compiled.asm["ptx"])
    except Exception as error:
        warnings.warn(
            "block barriers are kept, though they may be redundant: nothing could be compiled "
            f"to see that ({error})",
            stacklevel=2,
        )
        return True


@lru_cache
def compile_target(device: torch.device) -> GPUTarget | None:
    """What Triton compiles for while `device` is the current one; None for its interpreter."""
    return None if INTERPRETED else triton.runtime.driver.active.get_current_target()


def sweep_constants(plan: Plan, D: int, target: GPUTarget | None = None) -> dict[str, Any]:
    """The constexpr arguments that both sweeps take from a plan and, in a group, a target."""
    return {
        "D": D,
        "PROGRAMS": plan.programs,
        "BLOCK_H": plan.block_h,
        "BLOCK_K": plan.block_k,
        "BLOCK_B": plan.block_b,
        "REGISTERS": plan.chunks,
        "STREAM": plan.regime == "streamed",
        "BLOCK_BARRIER": plan.programs > 1 and needs_block_barriers(target),
        "FAST": plan.fast,
    }


def launch_options(plan: Plan) -> dict[str, Any]:
    """What the compiler is told beside the arguments."""
    options = {"num_warps": plan.warps, "num_stages": 1, "enable_fp_fusion": True}
    if plan.programs > 1:
        options["launch_cooperative_grid"] = True
    return options
