"""Which plans of a sweep fit a chip, and which is best. Plain Python.

What fits is arithmetic on registers, shared memory and on how many programs are resident at once;
which is best is a guess by :func:`fused_rnn.kernels.cost.step_us`, which `fused_rnn.tune` replaces
by a measurement.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from fused_rnn.kernels.chips import Limits
from fused_rnn.kernels.cost import PARTS_BYTES, operand_bytes, step_us
from fused_rnn.kernels.plan import DoesNotFit, Plan, PlanRequest

WORKING = 120  # registers per thread beside the weights: 80 to 115 in the compiled kernels
WORKING_SHARED = 79  # and two tiles, where some from shared memory pass through registers
STATES, FACTORS = 2, 6  # of the LSTM, which has most of the cells that those were counted for
TILES = 14  # of its step in registers at once: slots, factors, states
WORKING_JOINED = 127  # the same where no tile does, and h is read in pieces
H_CHUNKS = 4  # of h in shared memory for wgmma, see `products.AHEAD`
MOST_CHUNKS = 8  # of h in registers, see `weights.load_h`
STAGES = 3  # tiles of streamed weights under way


def plans(request: PlanRequest, limits: Limits) -> list[Plan]:
    """All plans that fit, best first.

    Args:
        request: the layer.
        limits: the chip.

    Raises:
        DoesNotFit: if none does, with the reason.
    """
    fitting: list[Plan] = []
    try:
        fitting.append(_persistent(request, limits))
        refusal = "One program could hold the weights, but a group takes less time"
    except DoesNotFit as reason:
        refusal = str(reason)
    if limits.groups and not request.cell.whole:
        groups = [*_cooperative(request, limits), *_joined(request, limits)]
        if not fitting and not groups:
            groups = list(_streamed(request, limits))
        fitting += groups
    if not fitting:
        if request.cell.whole:
            refusal += ", and its step takes all units of a head together, in one program"
        elif not limits.groups:
            refusal += ", and a group of programs cannot run here"
        raise DoesNotFit(refusal)
    fitting = [plan if plan.programs == 1 else replace(plan, why=refusal) for plan in fitting]
    return sorted(fitting, key=lambda plan: plan.step_us)


def make_plan(request: PlanRequest, limits: Limits) -> Plan:
    """The best of `plans`."""
    return plans(request, limits)[0]


def _plan(request: PlanRequest, limits: Limits, **parts: Any) -> Plan:
    """The plan of the given parts, with what follows from them."""
    fast = request.fast and request.itemsize == 2 and limits.fast_tanh
    heads = f"{request.heads} heads of {request.H}; " if request.heads > 1 else ""
    plan = Plan(directions=request.D, fast=fast, work=0.0, step_us=0.0, heads=heads, **parts)
    columns = -(-request.H // plan.block_k) * plan.block_k
    work = plan.programs * plan.block_h * columns / request.H**2
    plan = replace(plan, work=work)
    if plan.programs > 1:
        plan = replace(plan, **_residency(request, limits, plan))
    return replace(plan, step_us=step_us(request, plan, limits))


def _more_registers(request: PlanRequest, limits: Limits, units: int, warps: int, b: int) -> int:
    """Registers per thread for what a cell's step has more than that of an LSTM.

    The reverse sweep has each state twice, as it was and as its gradient, and each parameter with
    the sum of its gradients. What an LSTM needs was counted for 4 elements of a tile in a thread.
    """
    cell = request.cell
    tiles = 2 * (cell.states - STATES) + 2 * cell.parameters + cell.factors - FACTORS
    elements = units * b // (warps * limits.warp)
    return tiles * elements + TILES * max(0, elements - 4) if tiles > 0 else 0


def _persistent(request: PlanRequest, limits: Limits) -> Plan:
    """One program for all units."""
    H, itemsize, gates = request.H, operand_bytes(request, limits), request.cell.gates
    block_h = max(16, 1 << (H - 1).bit_length())
    # A warp's mma tile has 16 rows: with 16 units per warp the gates of a unit meet in one thread.
    warps = min(limits.warps, block_h // 16)
    if itemsize == PARTS_BYTES:  # six products for one: more warps share them
        warps = min(limits.warps, block_h // (16 if gates == 1 else 8))
    elif request.ieee:  # multiply-adds hold both operands in registers: more threads, less in each
        warps = min(limits.warps, max(4, block_h // 4))
    weight_bytes = gates * block_h * block_h * itemsize
    weight_registers, room = _weights_and_room(request, limits, block_h, warps)
    while request.cell.whole and weight_registers > room and warps < limits.warps:
        warps *= 2  # no group takes it over: more threads, with less of a tile in each
        weight_registers, room = _weights_and_room(request, limits, block_h, warps)
    # wgmma is the lesser evil for TF32: a thread has no registers left for the batched dot.
    batched = itemsize == PARTS_BYTES or (limits.wide_mma and itemsize == 2)
    m_split = warps if batched else 1
    if weight_registers > room:
        held = max(0, room) * 4 * limits.warp * warps
        raise DoesNotFit(
            f"{request.cell.name} with H = {H} needs {weight_bytes // 1024} KiB for its recurrent "
            f"weights, and the registers of one program hold {held // 1024} KiB"
        )
    # The chip is full with tiles of 8: larger ones then share the fixed cost of a step.
    tiles = -(-request.B // 8) * request.D
    wide = tiles > limits.sms and weight_registers * itemsize <= 256 and not request.ieee
    more = _more_registers(request, limits, block_h, warps, 16)
    if more > 0 and weight_registers > limits.registers - WORKING - more:
        wide = False
    block_b = 16 if wide else 8

    shared = _persistent_shared(request, limits, block_h, block_b, m_split)
    if shared > limits.shared:
        raise DoesNotFit(
            f"{request.cell.name} with H = {H} needs {shared // 1024} KiB of shared memory, and a "
            f"program has {limits.shared // 1024} KiB"
        )
    return _plan(
        request,
        limits,
        regime="persistent",
        block_h=block_h,
        block_k=block_h,
        block_b=block_b,
        warps=warps,
        k_split=1,
        m_split=m_split,
        programs=1,
        tiles=0,
        chunks=1,
        weights="shared" if request.ieee and limits.fp32_mma else "registers",
        weight_registers=weight_registers,
        shared=shared,
    )


def _weights_and_room(
    request: PlanRequest, limits: Limits, block_h: int, warps: int
) -> tuple[int, int]:
    """Registers per thread that the weights take, and those that the rest of a step leaves them."""
    weights = request.cell.gates * block_h * block_h * operand_bytes(request, limits)
    more = _more_registers(request, limits, block_h, warps, 8)
    return weights // (4 * limits.warp * warps), limits.registers - WORKING - more


def _persistent_shared(
    request: PlanRequest, limits: Limits, block_h: int, block_b: int, split: int
) -> int:
    """Bytes of shared memory of such a program.

    Weights pass through it two gates at a time; beside them lie the small tiles.
    """
    itemsize, gates = operand_bytes(request, limits), request.cell.gates
    exchange = block_b * 1024
    if request.ieee and limits.fp32_mma:  # both operands of all products from there
        return gates * block_h * block_h * itemsize + 2 * exchange
    tile = min(2, gates) * block_h * block_h * itemsize
    if limits.warp == 64:  # there the compiler lets them share
        return max(tile, exchange)
    if limits.wide_mma and itemsize == 4:  # both operands of wgmma and tcgen05 lie there
        return 2 * tile + exchange
    if split > 1 and gates > 1:
        return tile + tile * block_b // 16 + exchange
    return tile + exchange


def _cooperative(request: PlanRequest, limits: Limits) -> Iterator[Plan]:
    """A group whose weights stay on the chip."""
    H, itemsize = request.H, operand_bytes(request, limits)
    # Units that fill an mma tile of 16 rows: of GRU's n, 16.
    rows = 8 if request.cell.gates == 4 else 16
    few = (8,) if itemsize == PARTS_BYTES else ()  # in parts, weights take so many registers
    for block_h, warps in product((*few, 16, 32, 64), (2, 4, 8)):
        gates = request.cell.gates
        gates += gates % 2 if block_h == 8 else 0  # mma takes 16 rows, two gates of 8
        programs = -(-H // block_h)
        m_split = max(1, min(warps // 2, block_h // rows, warps * block_h // 64))
        if H > 1024:  # a thread's part of h is long: each warp takes another part
            m_split = 1
        k_split = warps // m_split
        widths = _chunks(H, 16 * warps)  # in the reverse sweep a warp needs 16 rows
        for block_k, block_b in product(widths, (8, 16)):
            if programs < 2 or (block_b > 8 and block_b // 2 >= request.B):
                continue
            count = -(-H // block_k)
            tile_registers = gates * block_h * block_k * itemsize // (128 * warps)
            chunks = count
            more = _more_registers(request, limits, block_h, warps, block_b)
            tile = min(2, gates) * block_h * block_k * itemsize
            if count * tile_registers > limits.registers - WORKING - more:
                more += WORKING_SHARED + 2 * tile // (128 * warps)
                chunks = min(count, max(0, limits.registers - more) // tile_registers)
            kept = (count - chunks) * gates * block_h * block_k * itemsize
            shared = kept + tile + _exchange(request, block_h, block_k, block_b, k_split, warps)
            weights = {count: "registers", 0: "shared"}.get(chunks, "registers and shared")
            plan = _plan(
                request,
                limits,
                regime="cooperative",
                block_h=block_h,
                block_k=block_k,
                block_b=block_b,
                warps=warps,
                k_split=k_split,
                m_split=m_split,
                programs=programs,
                tiles=1,
                chunks=chunks,
                weights=weights,
                weight_registers=chunks * tile_registers,
                shared=shared,
            )
            if shared <= limits.shared and plan.tiles:
                yield plan


def _joined(request: PlanRequest, limits: Limits) -> Iterator[Plan]:
    """A cooperative group with all gates in one tile of 128 rows, for wgmma.

    Its weights are in registers and in shared memory, where wgmma reads them. Three tiles are in
    registers; more of them would leave the compiler too few, and only do so where they must.
    """
    H, itemsize = request.H, request.itemsize
    if itemsize != 2 or not limits.wgmma:
        return
    rows = block_k = 128  # eight warps of 16 rows, in the reverse sweep, too
    warps, block_h = 8, rows // request.cell.slots
    programs, count = -(-H // block_h), -(-H // block_k)
    tile = rows * block_k * itemsize
    tile_registers = tile // (128 * warps)
    for block_b in (16, 32):
        if programs < 2 or block_b // 2 >= request.B:
            continue
        more = _more_registers(request, limits, block_h, warps, block_b)
        room = max(0, limits.registers - WORKING_JOINED - more) // tile_registers
        h = block_k * block_b * itemsize
        beyond = count - (limits.shared - 1024 - H_CHUNKS * h) // tile
        chunks = min(count, room, max(3, beyond))
        kept = (count - chunks) * tile
        shared = 1024 + max(kept + H_CHUNKS * h, tile + count * h)  # the latter before the loop
        weights = {count: "registers", 0: "shared"}.get(chunks, "registers and shared")
        plan = _plan(
            request,
            limits,
            regime="cooperative",
            block_h=block_h,
            block_k=block_k,
            block_b=block_b,
            warps=warps,
            k_split=1,
            m_split=1,
            programs=programs,
            tiles=1,
            chunks=chunks,
            weights=weights,
            weight_registers=chunks * tile_registers,
            shared=shared,
            joined=True,
        )
        if shared <= limits.shared and plan.tiles:
            yield plan


def _streamed(request: PlanRequest, limits: Limits) -> Iterator[Plan]:
    """A group that reads its weights in every step, STAGES tiles ahead."""
    H, itemsize, gates = request.H, request.itemsize, request.cell.gates
    warps = 4
    for block_h in (16, 32, 64, 128):
        for block_k in (16, 32, 64):
            tile = gates * block_h * block_k * itemsize
            shared = STAGES * (tile + 2 * block_k * 8 * itemsize)
            shared += _exchange(request, block_h, block_k, 8, 1, warps)
            plan = _plan(
                request,
                limits,
                regime="streamed",
                block_h=block_h,
                block_k=block_k,
                block_b=8,
                warps=warps,
                k_split=1,
                m_split=1,
                programs=-(-H // block_h),
                tiles=1,
                chunks=0,
                weights="L2",
                weight_registers=0,
                shared=shared,
            )
            if shared <= limits.shared and plan.programs > 1 and plan.tiles:
                yield plan


def _chunks(H: int, least: int) -> list[int]:
    """Widths of a tile of weights: powers of two from `least` on, those with the least padding."""
    widths = [least << n for n in range(12) if least << n <= min(1024, 2 * H - 1)]
    padded = {w: -(-H // w) * w for w in widths if -(-H // w) <= MOST_CHUNKS}
    return [w for w in padded if padded[w] == min(padded.values())]


def _exchange(
    request: PlanRequest, block_h: int, block_k: int, block_b: int, k_split: int, warps: int
) -> int:
    """Bytes of shared memory for what moves between threads in a step, taken generously."""
    columns = 1 << (-(-request.H // block_k) * block_k - 1).bit_length()
    h = min(columns, MOST_CHUNKS * block_k) * block_b * request.itemsize
    partial_sums = 4 * block_h * block_b * 4 * k_split
    dh = block_k * block_b * 4
    dgates = 2 * block_h * block_b * request.itemsize * warps
    return max(h, partial_sums, dh) + dgates + 1024


def _residency(request: PlanRequest, limits: Limits, plan: Plan) -> dict[str, int]:
    """Batch tiles and directions of one launch, all of whose programs are resident at once."""
    groups = limits.places(plan.warps, plan.shared) // plan.programs
    directions = min(request.D, groups)
    return {"tiles": groups // directions if groups else 0, "directions": directions}
