"""The plan of a sweep: which tiles, how many warps, where the weights stay. Plain Python.

One program holds the recurrent weights of one direction on one SM and carries a tile of sequences
through all time steps. So the plan is a question of registers: of those of a thread, the sweep
itself (state, gates, loads under way, addresses) needs up to `WORKING`, the rest is for weights.
"""

from dataclasses import dataclass
from typing import Literal

WORKING = 120  # registers per thread beside the weights: 80 to 115 in the compiled kernels


@dataclass(frozen=True)
class Limits:
    """What one chip offers.

    Attributes:
        target: Triton's name of the architecture, e.g. 90 or "gfx942".
        sms: multiprocessors of the largest common product, when no device is there to be asked.
        shared: bytes of shared memory that one program may use.
        warp: threads of a warp.
        registers: of one thread.
        warps: as many of a program as may use all those registers.
        wide_mma: a plain dot of 64 rows or more becomes wgmma or tcgen05, not mma.sync.
        fast_tanh: tanh.approx.f32 exists.
    """

    target: int | str
    sms: int
    shared: int
    warp: int = 32
    registers: int = 255
    warps: int = 8
    wide_mma: bool = False
    fast_tanh: bool = True


LIMITS = {
    limits.target: limits
    for limits in (
        Limits(80, sms=108, shared=163 * 1024),
        Limits(86, sms=84, shared=99 * 1024),
        Limits(89, sms=144, shared=99 * 1024),
        Limits(90, sms=132, shared=227 * 1024, wide_mma=True),
        Limits(100, sms=148, shared=227 * 1024, wide_mma=True),
        Limits(120, sms=188, shared=99 * 1024),
        Limits(
            "gfx942", sms=304, shared=64 * 1024, warp=64, registers=512, warps=4, fast_tanh=False
        ),
    )
}


@dataclass(frozen=True)
class Spec:
    """What the plan has to know of a cell: gates with recurrent weights, slots, states."""

    gates: int
    slots: int
    states: int


SPECS = {
    "rnn_tanh": Spec(gates=1, slots=1, states=1),
    "rnn_relu": Spec(gates=1, slots=1, states=1),
    "gru": Spec(gates=3, slots=4, states=1),
    "lstm": Spec(gates=4, slots=4, states=2),
}


@dataclass(frozen=True)
class Plan:
    """A launch of either sweep.

    Attributes:
        block_h: hidden units of a tile, a power of two; units beyond H are masked.
        block_b: sequences of a tile.
        warps: warps of a program.
        batch: leading axis of the weight tiles (`tiles.product`): 1 is a plain dot.
        fast: approximate tanh and sigmoid.
        weights: "registers", or "shared" if every step reads them from shared memory.
        weight_registers: registers per thread that hold weights, or would.
        shared: bytes of shared memory that the program may need.
    """

    block_h: int
    block_b: int
    warps: int
    batch: int
    fast: bool
    weights: Literal["registers", "shared"]
    weight_registers: int
    shared: int


class DoesNotFit(ValueError):
    """No plan: the weights do not fit into the registers of one program."""


def make_plan(
    cell: str,
    H: int,
    itemsize: int,
    B: int,
    D: int,
    limits: Limits,
    *,
    precision: Literal["ieee", "tf32"] = "tf32",
    fast: bool = True,
) -> Plan:
    """Plan both sweeps of a layer.

    Args:
        cell: a key of `SPECS`.
        H: hidden units.
        itemsize: bytes of an element of the weights.
        B: sequences; decides the batch tile only.
        D: directions.
        limits: the chip.
        precision: of fp32 products.
        fast: allow approximate activations (16-bit types only).

    Raises:
        DoesNotFit: with the reason.
    """
    gates = SPECS[cell].gates
    block_h = max(16, 1 << (H - 1).bit_length())
    # A warp's mma tile has 16 rows: with 16 units per warp the gates of a unit meet in one thread.
    warps = min(limits.warps, block_h // 16)
    # wgmma is the lesser evil for fp32: a thread has no registers left for the batched dot.
    batch = warps if limits.wide_mma and itemsize == 2 else 1

    weight_bytes = gates * block_h * block_h * itemsize
    weight_registers = weight_bytes // (4 * limits.warp * warps)
    room = limits.registers - WORKING
    if weight_registers > room:
        raise DoesNotFit(
            f"{cell} with H = {H} needs {weight_bytes // 1024} KiB for its recurrent weights, and "
            f"the registers of one program hold {room * 4 * limits.warp * warps // 1024} KiB"
        )
    ieee = itemsize == 4 and precision == "ieee"
    # The chip is full with tiles of 8: larger ones then share the fixed cost of a step.
    tiles = -(-B // 8) * D
    block_b = 16 if tiles > limits.sms and weight_registers * itemsize <= 256 and not ieee else 8

    # Weights pass through shared memory two gates at a time; beside them lie the small tiles.
    tile = min(2, gates) * block_h * block_h * itemsize
    exchange = block_b * 1024
    if limits.warp == 64:  # there the compiler lets them share
        shared = max(tile, exchange)
    elif limits.wide_mma and itemsize == 4:  # both operands of wgmma and tcgen05 lie there
        shared = 2 * tile + exchange
    elif batch > 1 and gates > 1:
        shared = tile + tile * block_b // 16 + exchange
    else:
        shared = tile + exchange
    if ieee:  # no tensor cores: plain multiply-adds, both operands of all products from there
        shared = weight_bytes + 2 * exchange
    if shared > limits.shared:
        raise DoesNotFit(
            f"{cell} with H = {H} needs {shared // 1024} KiB of shared memory, and a program has "
            f"{limits.shared // 1024} KiB"
        )
    return Plan(
        block_h=block_h,
        block_b=block_b,
        warps=warps,
        batch=batch,
        fast=fast and itemsize == 2 and limits.fast_tanh,
        weights="shared" if ieee else "registers",
        weight_registers=weight_registers,
        shared=shared,
    )
