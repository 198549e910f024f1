"""The plan of a sweep: regime, tiles, number of programs, where the weights stay. Plain Python.

Three regimes, one pair of kernels:

    persistent   One program holds the recurrent weights of a direction and carries a tile of
                 sequences through all time steps. Nothing leaves the SM but results.
    cooperative  A group of programs shares the hidden units of a batch tile. Each keeps its rows
                 of the weights; once per step h (or a part of dh) goes through L2.
    streamed     The same group where not even the whole chip holds the weights: each program reads
                 its rows through L2 in every step.

`plans` lists what fits, best first. What fits is arithmetic on registers, shared memory and on how
many programs are resident at once; which is best is a guess by `step_cycles`, which
`fused_rnn.tune` replaces by a measurement.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Literal

Regime = Literal["persistent", "cooperative", "streamed"]
WORKING = 120  # registers per thread beside the weights: 80 to 115 in the compiled kernels
WORKING_SHARED = 155  # the same if tiles from shared memory pass through registers, too
MOST_CHUNKS = 8  # of h in registers, see `weights.load_h`
MOST_WORK = 1.35  # padded over needed, if a group can have less
STAGES = 3  # tiles of streamed weights under way
MOST_TILES = 65535  # of a launch: they are the second axis of its grid


@dataclass(frozen=True)
class Limits:
    """What one chip offers. Speeds are of the fastest common product, from its data sheet.

    Attributes:
        target: Triton's name of the architecture, e.g. 90 or "gfx942".
        sms: multiprocessors, when no device is there to be asked.
        shared: bytes of shared memory that one program may use.
        sm_shared: bytes of shared memory of one SM.
        clock: GHz.
        l2: MiB.
        memory: bandwidth in TB/s.
        warp: threads of a warp.
        registers: of one thread.
        warps: as many of a program as may use all those registers.
        wide_mma: a plain dot of 64 rows or more becomes wgmma or tcgen05, not mma.sync.
        fast_tanh: tanh.approx.f32 exists, and inline assembly to reach it.
        groups: programs of a launch can wait for each other.
        hop_us: microseconds of a barrier among 32 of them, release to acquire; see `step_cycles`.
        programs: as many of a launch as may wait for each other, if the driver takes fewer than the
            chip has room for.
    """

    target: int | str
    sms: int
    shared: int
    sm_shared: int
    clock: float
    l2: int
    memory: float
    warp: int = 32
    registers: int = 255
    warps: int = 8
    wide_mma: bool = False
    fast_tanh: bool = True
    groups: bool = True
    hop_us: float = 0.855
    programs: int | None = None


_K = 1024
LIMITS = {
    limits.target: limits
    for limits in (
        Limits(80, 108, 163 * _K, 164 * _K, clock=1.41, l2=40, memory=2.0),
        Limits(86, 84, 99 * _K, 100 * _K, clock=1.7, l2=6, memory=0.9),
        Limits(89, 144, 99 * _K, 100 * _K, clock=2.5, l2=72, memory=1.0),
        Limits(90, 132, 227 * _K, 228 * _K, clock=1.755, l2=50, memory=3.35, wide_mma=True),
        Limits(100, 148, 227 * _K, 228 * _K, clock=1.85, l2=126, memory=8.0, wide_mma=True),
        Limits(120, 188, 99 * _K, 100 * _K, clock=2.6, l2=128, memory=1.8),
        # No groups: Triton lets the releasing wave wait for its own stores only, and nothing
        # proves that those of the other waves have arrived by then.
        Limits(
            "gfx942",
            304,
            64 * _K,
            64 * _K,
            clock=2.1,
            l2=32,
            memory=5.3,
            warp=64,
            registers=512,
            warps=4,
            fast_tanh=False,
            groups=False,
        ),
    )
}


@dataclass(frozen=True)
class Spec:
    """What the plan has to know of a cell.

    Attributes:
        gates: of the recurrent product, 1, 3 or 4.
        slots: of a unit in the gate buffer, 1 or 4.
        states: 1, or 2 with c.
    """

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
    """How both sweeps of a layer run.

    Attributes:
        regime: see above.
        block_h: hidden units of a program, a power of two; units beyond H are masked.
        block_k: of all H units, those of one tile of weights.
        block_b: sequences of a program.
        warps: warps of a program.
        k_split: forward, slices of the columns of a tile of weights, see `weights.product`.
        m_split: slices of its rows; 1 and 1 is a plain dot.
        members: programs of a group.
        tiles: batch tiles of one launch, 0 for all; then the next launch takes on.
        directions: of one launch.
        chunks: tiles of weights along H that stay in registers.
        fast: approximate tanh and sigmoid.
        weights: where they are from step to step.
        weight_registers: registers per thread that hold weights, or would.
        shared: bytes of shared memory that the program may need.
        work: padded multiply-adds of a step over the needed ones.
        why: why not fewer programs.
        step_us: a guess of both sweeps' time per step in microseconds, all launches together;
            it ranks plans and is no measurement.
    """

    regime: Regime
    block_h: int
    block_k: int
    block_b: int
    warps: int
    k_split: int
    m_split: int
    members: int
    tiles: int
    directions: int
    chunks: int
    fast: bool
    weights: Literal["registers", "registers and shared", "shared", "L2"]
    weight_registers: int
    shared: int
    work: float = field(compare=False)
    step_us: float = field(compare=False)
    why: str = field(compare=False, default="")

    @cached_property
    def _hash(self) -> int:
        return hash((self.regime, self.block_h, self.block_k, self.block_b, self.warps, self.tiles))

    def __hash__(self) -> int:
        """Of what differs most, and kept: every launch asks."""
        return self._hash

    @cached_property
    def reason(self) -> str:
        """The plan and what led to it."""
        text = f"{self}; {self.weight_registers} registers of a thread hold weights, "
        text += f"up to {self.shared // _K} KiB of shared memory, {self.work:.2f} of the products"
        text += " that are needed"
        return f"{text}. {self.why}" if self.why else text

    def launches(self, B: int, D: int) -> Iterator[tuple[int, int, int, int]]:
        """First batch tile and number of tiles, first direction and number of them, per launch."""
        all_tiles = -(-B // self.block_b)
        tiles = min(self.tiles or all_tiles, MOST_TILES)
        for direction in range(0, D, self.directions):
            for tile in range(0, all_tiles, tiles):
                left = min(tiles, all_tiles - tile), min(self.directions, D - direction)
                yield tile, left[0], direction, left[1]

    def __str__(self) -> str:
        tile = f"{self.block_h} units x {self.block_b} sequences in {self.warps} warps"
        text = f"{self.regime}: {tile}, weights in {self.weights}"
        if self.members > 1:
            text += f", groups of {self.members} programs"
        if self.tiles:
            text += f", up to {self.tiles} batch tiles a launch"
        return text


class DoesNotFit(ValueError):
    """No plan, and why."""


@dataclass(frozen=True)
class _Case:
    """What is to be planned, see `plans`."""

    cell: str
    H: int
    itemsize: int
    B: int
    D: int
    limits: Limits
    ieee: bool
    fast: bool

    @property
    def gates(self) -> int:
        return SPECS[self.cell].gates

    def plan(self, **parts: object) -> Plan:
        plan = Plan(
            directions=self.D,
            fast=self.fast and self.itemsize == 2 and self.limits.fast_tanh,
            work=0.0,
            step_us=0.0,
            **parts,  # type: ignore[arg-type]
        )
        columns = -(-self.H // plan.block_k) * plan.block_k
        work = plan.members * plan.block_h * columns / self.H**2
        plan = replace(plan, work=work)
        if plan.members > 1:
            plan = replace(plan, **_residency(self, plan))
        cycles = step_cycles(self, plan) * _launches(self, plan)
        return replace(plan, step_us=cycles / (1000 * self.limits.clock))


def plans(
    cell: str,
    H: int,
    itemsize: int,
    B: int,
    D: int,
    limits: Limits,
    *,
    precision: Literal["ieee", "tf32"] = "tf32",
    fast: bool = True,
) -> list[Plan]:
    """All plans that fit, best first.

    Args:
        cell: a key of `SPECS`.
        H: hidden units.
        itemsize: bytes of an element of the weights.
        B: sequences.
        D: directions.
        limits: the chip.
        precision: of fp32 products.
        fast: allow approximate activations (16-bit types only).

    Raises:
        DoesNotFit: if none does, with the reason.
    """
    if cell not in SPECS:
        raise DoesNotFit(f"there are no kernels for {cell}")
    ieee = itemsize == 4 and precision == "ieee"
    case = _Case(cell, H, itemsize, B, D, limits, ieee, fast)
    found: list[Plan] = []
    try:
        found.append(_persistent(case))
        refusal = "One program could hold the weights, but a group takes less time"
    except DoesNotFit as reason:
        refusal = str(reason)
    if limits.groups:
        groups = list(_cooperative(case))
        if not found and not groups:
            groups = list(_streamed(case))
        found += [plan for plan in groups if plan.work <= MOST_WORK] or _least_work(groups)
    if not found:
        if not limits.groups:
            refusal += ", and a group of programs cannot run here"
        raise DoesNotFit(refusal)
    found = [plan if plan.members == 1 else replace(plan, why=refusal) for plan in found]
    return sorted(found, key=lambda plan: plan.step_us)


def _least_work(plans: list[Plan]) -> list[Plan]:
    least = min((plan.work for plan in plans), default=0.0)
    return [plan for plan in plans if plan.work == least]


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
    """The best of `plans`."""
    return plans(cell, H, itemsize, B, D, limits, precision=precision, fast=fast)[0]


def _persistent(case: _Case) -> Plan:
    """One program for all units."""
    H, itemsize, limits, gates = case.H, case.itemsize, case.limits, case.gates
    block_h = max(16, 1 << (H - 1).bit_length())
    # A warp's mma tile has 16 rows: with 16 units per warp the gates of a unit meet in one thread.
    warps = min(limits.warps, block_h // 16)
    # wgmma is the lesser evil for fp32: a thread has no registers left for the batched dot.
    split = warps if limits.wide_mma and itemsize == 2 else 1

    weight_bytes = gates * block_h * block_h * itemsize
    weight_registers = weight_bytes // (4 * limits.warp * warps)
    room = limits.registers - WORKING
    if weight_registers > room:
        raise DoesNotFit(
            f"{case.cell} with H = {H} needs {weight_bytes // _K} KiB for its recurrent weights, "
            f"and the registers of one program hold {room * 4 * limits.warp * warps // _K} KiB"
        )
    # The chip is full with tiles of 8: larger ones then share the fixed cost of a step.
    tiles = -(-case.B // 8) * case.D
    wide = tiles > limits.sms and weight_registers * itemsize <= 256 and not case.ieee
    block_b = 16 if wide else 8

    # Weights pass through shared memory two gates at a time; beside them lie the small tiles.
    tile = min(2, gates) * block_h * block_h * itemsize
    exchange = block_b * 1024
    if limits.warp == 64:  # there the compiler lets them share
        shared = max(tile, exchange)
    elif limits.wide_mma and itemsize == 4:  # both operands of wgmma and tcgen05 lie there
        shared = 2 * tile + exchange
    elif split > 1 and gates > 1:
        shared = tile + tile * block_b // 16 + exchange
    else:
        shared = tile + exchange
    if case.ieee:  # no tensor cores: plain multiply-adds, both operands of all products from there
        shared = weight_bytes + 2 * exchange
    if shared > limits.shared:
        raise DoesNotFit(
            f"{case.cell} with H = {H} needs {shared // _K} KiB of shared memory, and a program "
            f"has {limits.shared // _K} KiB"
        )
    return case.plan(
        regime="persistent",
        block_h=block_h,
        block_k=block_h,
        block_b=block_b,
        warps=warps,
        k_split=1,
        m_split=split,
        members=1,
        tiles=0,
        chunks=1,
        weights="shared" if case.ieee else "registers",
        weight_registers=weight_registers,
        shared=shared,
    )


def _cooperative(case: _Case) -> Iterator[Plan]:
    """A group whose weights stay on the chip; ieee products would spill."""
    H, itemsize, limits, gates = case.H, case.itemsize, case.limits, case.gates
    if case.ieee:
        return
    rows = 8 if gates == 4 else 16  # units that fill an mma tile of 16 rows: of GRU's n, 16
    for block_h, warps in product((16, 32, 64), (2, 4, 8)):
        members = -(-H // block_h)
        m_split = max(1, min(warps // 2, block_h // rows, warps * block_h // 64))
        if H > 1024:  # a thread's part of h is long: each warp takes another part
            m_split = 1
        k_split = warps // m_split
        widths = _chunks(H, 16 * warps)  # in the reverse sweep a warp needs 16 rows
        for block_k, block_b in product(widths, (8, 16)):
            if members < 2 or (block_b > 8 and block_b // 2 >= case.B):
                continue
            count = -(-H // block_k)
            tile_registers = gates * block_h * block_k * itemsize // (128 * warps)
            chunks = count
            if count * tile_registers > limits.registers - WORKING:
                chunks = (limits.registers - WORKING_SHARED) // tile_registers
            tile = min(2, gates) * block_h * block_k * itemsize
            kept = (count - chunks) * gates * block_h * block_k * itemsize
            shared = kept + tile + _exchange(case, block_h, block_k, block_b, k_split, warps)
            weights = {count: "registers", 0: "shared"}.get(chunks, "registers and shared")
            plan = case.plan(
                regime="cooperative",
                block_h=block_h,
                block_k=block_k,
                block_b=block_b,
                warps=warps,
                k_split=k_split,
                m_split=m_split,
                members=members,
                tiles=1,
                chunks=chunks,
                weights=weights,
                weight_registers=chunks * tile_registers,
                shared=shared,
            )
            if shared <= limits.shared and plan.tiles:
                yield plan


def _streamed(case: _Case) -> Iterator[Plan]:
    """A group that reads its weights in every step, STAGES tiles ahead."""
    H, itemsize, limits, gates = case.H, case.itemsize, case.limits, case.gates
    warps = 4
    for block_h in (16, 32, 64, 128):
        for block_k in (16, 32, 64):
            tile = gates * block_h * block_k * itemsize
            shared = STAGES * (tile + 2 * block_k * 8 * itemsize)
            shared += _exchange(case, block_h, block_k, 8, 1, warps)
            plan = case.plan(
                regime="streamed",
                block_h=block_h,
                block_k=block_k,
                block_b=8,
                warps=warps,
                k_split=1,
                m_split=1,
                members=-(-H // block_h),
                tiles=1,
                chunks=0,
                weights="L2",
                weight_registers=0,
                shared=shared,
            )
            if shared <= limits.shared and plan.members > 1 and plan.tiles:
                yield plan


def _chunks(H: int, least: int) -> list[int]:
    """Widths of a tile of weights: powers of two from `least` on, those with the least padding."""
    widths = [least << n for n in range(12) if least << n <= min(1024, 2 * H - 1)]
    padded = {w: -(-H // w) * w for w in widths if -(-H // w) <= MOST_CHUNKS}
    return [w for w in padded if padded[w] == min(padded.values())]


def _exchange(
    case: _Case, block_h: int, block_k: int, block_b: int, k_split: int, warps: int
) -> int:
    """Bytes of shared memory for what moves between threads in a step, taken generously."""
    columns = 1 << (-(-case.H // block_k) * block_k - 1).bit_length()
    h = min(columns, MOST_CHUNKS * block_k) * block_b * case.itemsize
    partial_sums = 4 * block_h * block_b * 4 * k_split
    dh = block_k * block_b * 4
    dgates = 2 * block_h * block_b * case.itemsize * warps
    return max(h, partial_sums, dh) + dgates + 1024


def _residency(case: _Case, plan: Plan) -> dict[str, int]:
    """Batch tiles and directions of one launch, all of whose programs are resident at once.

    Registers are counted as if each thread had the most, so the compiled kernel can only need less.
    """
    by_registers = 65536 // (plan.warps * 32 * 256)
    by_shared = case.limits.sm_shared // (plan.shared + _K)  # each program takes 1 KiB more
    programs = case.limits.sms * min(by_registers, by_shared)
    if case.limits.programs is not None:
        programs = min(programs, case.limits.programs)
    groups = programs // plan.members
    directions = min(case.D, groups)
    return {"tiles": groups // directions if groups else 0, "directions": directions}


def _launches(case: _Case, plan: Plan) -> int:
    tiles = -(-case.B // plan.block_b)
    if plan.members == 1:
        return -(-tiles * case.D // case.limits.sms)  # waves of one launch
    return -(-tiles // max(1, plan.tiles)) * -(-case.D // max(1, plan.directions))


L2_BYTES = 24
SHARED_BYTES = 5


def step_cycles(case: _Case, plan: Plan) -> float:
    """A guess at the cycles of a time step, forward and reverse together.

    What waits for what in a step is added up. The constants:

        33 cycles    one mma.sync of a dependent chain (A100, H100; "Dissecting the NVIDIA Hopper
                     architecture through microbenchmarking", arXiv 2501.12084)
        24 B/cycle   between L2 and one SM, in and out, while all SMs exchange (fitted to an H100);
        5 B/cycle    to each warp from tiles of weights in shared memory, conversions included
                     (fitted to an H100 and an H200; what the chip has is 128 for an SM)
        300 cycles   a load that hits L2 (the same paper: 260 to 280, and the way back)
        0.855 us     release to acquire among 32 programs, measured on an H100: 0.64 among 2 to 8,
                     0.83 among 16, 0.96 among 132, but steps of small groups do not gain the
                     difference. `python -m fused_rnn.check --remember` measures it on another GPU
        400 cycles   block barriers, conversions between layouts; 150 more where there are more
                     threads than units, 50 per tile of weights, 35 per slot and sequence of a
                     thread for the pointwise part (fitted to estimates from our machine code)
    """
    limits = case.limits
    columns = -(-case.H // plan.block_k) * plan.block_k
    slots = SPECS[case.cell].slots
    elements = max(1.0, plan.block_h * plan.block_b / (plan.warps * limits.warp))
    fma = 16 if case.itemsize == 2 else 8
    wide = plan.block_b // 8
    local = 2 * (400 + 35 * slots * elements)
    local += 100 * columns / plan.block_k
    if plan.block_h * plan.block_b < plan.warps * limits.warp:
        local += 2 * 150  # threads without a unit of their own: more conversions
    if case.ieee:  # a multiply-add per thread and cycle, four warps at a time
        local += 2 * case.gates * plan.block_h * columns * plan.block_b / 128
        chain = 0.0
    else:
        chain = 33 * wide * columns / (fma * plan.k_split)
        chain += 33 * wide * case.gates * plan.block_h / fma
    if plan.members == 1:
        return local + chain
    kept = case.gates * plan.block_h * columns * case.itemsize
    hop = 2 * (1000 * limits.hop_us * limits.clock + 300)
    exchange = columns * plan.block_b * (case.itemsize + 4 + 4) / L2_BYTES
    if plan.regime == "streamed":
        all_weights = plan.members * kept
        fits = all_weights < limits.l2 * 2**20
        from_memory = 0 if fits else all_weights / (limits.memory * 1000 / limits.clock)
        weights = 2 * max(kept / L2_BYTES, from_memory)
    else:
        left = kept - 128 * plan.weight_registers * plan.warps
        weights = 2 * left / (SHARED_BYTES * plan.warps)
    return local + chain + hop + exchange + weights
