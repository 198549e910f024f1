"""From a sweep to its launches, with little Python in between.

Triton's JIT looks at every argument of every launch to find the compiled kernel: 30 to 60
microseconds. The sweeps know what a kernel depends on, so they keep what the JIT found, and call
its launcher.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from fused_rnn.kernels.group import LINE
from fused_rnn.kernels.plan import Plan

# Slices of a stack's states and of a bias, and gradients from a user: their alignment changes with
# B and H, and would double the kernels. They are read before the first step, or one state of them.
ANY_ALIGNMENT = frozenset(
    ("b_ih", "b_hh", "bias", "vectors", "h0", "c0", "restart_h", "restart_c")
    + ("dh_n", "dc_n", "lengths", "drop")
)


def sweep_kernel(function: Callable[..., None]) -> Any:
    """`triton.jit` with what is never to make a kernel of its own: lengths, batches, alignments."""
    numbers = {"T", "B", "N", "first_tile", "first_direction", "reverse", "zero"}
    numbers |= {"zoneout", "clip", "scale"}  # floats, of which Triton makes nothing special
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(
        function,
        do_not_specialize=[name for name in names if name in numbers],
        do_not_specialize_on_alignment=[name for name in names if name in ANY_ALIGNMENT],
    )


class LaunchRefused(RuntimeError):
    """The driver takes no cooperative launch of so many programs; nothing has run.

    So it is where others share the GPU (MPS, MIG), or where programs may not wait for each other.

    Attributes:
        programs: of a launch that may be tried instead, 0 for none.
    """

    def __init__(self, text: str, programs: int) -> None:
        super().__init__(text)
        self.programs = programs


@dataclass(eq=False)
class Variant:
    """One sweep of one cell under one plan.

    Attributes:
        kernel: the Triton function.
        constants: its constexpr arguments.
        options: what the compiler is told beside the arguments.
        compiled: by device and by which tensors there are and their types, what the JIT found.
    """

    kernel: Any
    constants: dict[str, Any]
    options: dict[str, Any]
    compiled: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = getattr(self.kernel, "arg_names", ())  # a compiled kernel is called by position
        self.constants = {n: self.constants[n] for n in names if n in self.constants} or (
            self.constants
        )


class Launch(NamedTuple):
    """What is to be launched for a sweep: all its batch tiles and directions.

    Attributes:
        variant: the sweep.
        plan: how it runs.
        D: directions.
        device: where.
        tensors: arguments of the kernel, in its order.
        numbers: those behind them, in its order.
    """

    variant: Variant
    plan: Plan
    D: int
    device: torch.device
    tensors: dict[str, Tensor | None]
    numbers: dict[str, int | float | None]

    def again(self, kernel: Any, tensors: Mapping[str, Tensor | None], T: int, B: int) -> None:
        """Launch once more with some other memory of the same kinds, for T steps of B sequences.

        Args:
            kernel: what :func:`launch` returned, if it was not None.
            tensors: the other memory, of which as much is there, aligned as well.
            T: time steps.
            B: sequences, for which one launch is enough.

        Raises:
            RuntimeError: it fails, with the plan.
        """
        self.tensors.update(tensors)
        self.numbers.update(T=T, B=B)
        ((_, tiles, _, directions),) = self.plan.launches(B, self.D)
        grid = (self.plan.programs, tiles, directions)
        constants = self.variant.constants.values()
        try:
            kernel[grid](*self.tensors.values(), *self.numbers.values(), *constants)
        except (RuntimeError, TritonError) as error:
            raise RuntimeError(f"a sweep failed, planned as {self.plan}: {error}") from error


def launch(what: Launch) -> Any:
    """Launch a sweep, as often as the plan says; returns the compiled kernel if it may be kept.

    The counters belong to this call, so that streams, threads and replayed graphs share none. Who
    has zeros for them brings them along.

    Raises:
        LaunchRefused: the driver refuses a group.
        RuntimeError: a launch fails, with the plan.
    """
    variant, plan, D, device, tensors, numbers = what
    B: Any = numbers["B"]
    if plan.programs > 1 and tensors["counters"] is None:
        tensors["counters"] = zero_counters(plan, B, D, device)
    first = True
    for tile, tiles, direction, directions in plan.launches(B, D):
        numbers["first_tile"], numbers["first_direction"] = tile, direction
        grid = (plan.programs, tiles, directions)
        try:
            kernel = launch_once(variant, grid, device, tensors, numbers)
        except (RuntimeError, TritonError) as error:
            text = f"a sweep failed, planned as {plan}: {error}"
            if plan.programs > 1 and first:
                if "cooperative launch" in str(error):
                    programs = plan.programs * tiles * directions
                    raise LaunchRefused(text, programs // 2) from error
                if "operation not supported" in str(error):
                    raise LaunchRefused(text, 0) from error
            raise RuntimeError(text) from error
        first = False
    return kernel


def zero_counters(plan: Plan, B: int, D: int, device: torch.device, times: int = 1) -> Tensor:
    """Those of so many launches of a group, [times, ...]."""
    size = -(-B // plan.block_b) * D * 2 * LINE.value
    return torch.zeros((times, size), dtype=torch.int32, device=device)


def launch_once(
    variant: Variant,
    grid: tuple[int, int, int],
    device: torch.device,
    tensors: Mapping[str, Tensor | None],
    numbers: Mapping[str, int | float | None],
) -> Any:
    """Launch a kernel; the first time for arguments of a kind, through Triton's JIT.

    Returns what was compiled, None if others with such arguments need not get the same.
    """
    key = (
        device,
        *[None if t is None else t.dtype for t in tensors.values()],
        *[type(n) if n is None or n < 2**31 else "64 bits" for n in numbers.values()],
    )
    compiled, constants = variant.compiled.get(key), variant.constants
    if compiled is not None and _aligned(tensors):
        compiled[grid](*tensors.values(), *numbers.values(), *constants.values())
        return compiled
    made = variant.kernel[grid](**tensors, **numbers, **constants, **variant.options)
    # Neither those of Triton's interpreter are kept, nor on AMD GPUs, where it looks at sizes, too,
    # nor for memory that is aligned otherwise than usual: the JIT makes other kernels of that.
    if made is not None and torch.version.hip is None and _aligned(tensors):
        assert [*tensors, *numbers, *constants] == list(variant.kernel.arg_names)
        variant.compiled[key] = made
        return made
    return None


def _aligned(tensors: Mapping[str, Tensor | None]) -> bool:
    """Whether all tensors whose alignment counts begin at 16 bytes, as fresh memory does."""
    return not any(
        [
            t is not None and t.data_ptr() & 15 and name not in ANY_ALIGNMENT
            for name, t in tensors.items()
        ]
    )
