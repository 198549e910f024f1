"""A guess at what a plan costs, by which plans are ranked. Plain Python; no measurement."""

from fused_rnn.kernels.chips import Limits
from fused_rnn.kernels.plan import Plan, PlanRequest

L2_BYTES = 24
SHARED_BYTES = 5
PARTS_BYTES = 6  # three of bf16


def operand_bytes(request: PlanRequest, limits: Limits) -> int:
    """Bytes of a weight as products take it: an element, or the parts of one in full fp32."""
    return PARTS_BYTES if request.ieee and not limits.fp32_mma else request.itemsize


def step_us(request: PlanRequest, plan: Plan, limits: Limits) -> float:
    """Microseconds of a time step, forward and reverse together, of all launches."""
    cycles = step_cycles(request, plan, limits) * _launches(request, plan, limits)
    return cycles / (1000 * limits.clock)


def step_cycles(request: PlanRequest, plan: Plan, limits: Limits) -> float:
    """A guess at the cycles of a time step, forward and reverse together.

    What waits for what in a step is added up. The constants:

        33 cycles    one mma.sync of a dependent chain (A100, H100; "Dissecting the NVIDIA Hopper
                     architecture through microbenchmarking", arXiv 2501.12084)
        24 B/cycle   between L2 and one SM, in and out, while all SMs exchange (fitted to an H100);
        5 B/cycle    to each warp from tiles of weights in shared memory, conversions included
                     (fitted to an H100 and an H200; what the chip has is 128 for an SM)
        12 cycles    or half the batch tile, if that is more, for a wgmma of 64 rows and 16 columns,
                     the tensor cores' rate; 300 for each tile of joined gates (fitted to an H200)
        300 cycles   a load that hits L2 (the same paper: 260 to 280, and the way back)
        0.855 us     release to acquire among 32 programs, measured on an H100: 0.64 among 2 to 8,
                     0.83 among 16, 0.96 among 132, but steps of small groups do not gain the
                     difference. `python -m fused_rnn.check --remember` measures it on another GPU
        7 cycles     one mma.sync of many that do not depend on each other (6.3 on the H100, 8 on
                     the A100); of fp32 in parts there are six for one, in two chains of three
        11 cycles    to split two elements of an operand into parts, which every warp does by itself
        400 cycles   block barriers, conversions between layouts; 150 more where there are more
                     threads than units, 50 per tile of weights, 35 per slot and sequence of a
                     thread for the pointwise part (fitted to estimates from our machine code)
    """
    columns = -(-request.H // plan.block_k) * plan.block_k
    slots = request.cell.slots
    elements = max(1.0, plan.block_h * plan.block_b / (plan.warps * limits.warp))
    fma = 16 if request.itemsize == 2 else 8
    local = 2 * (400 + 35 * slots * elements)
    local += (300 if plan.joined else 100) * columns / plan.block_k
    wide = plan.block_b // 8
    if plan.block_h * plan.block_b < plan.warps * limits.warp:
        local += 2 * 150  # threads without a unit of their own: more conversions
    if request.ieee:
        chain = _full_precision(request, plan, limits, columns)
    elif plan.joined:
        tiles = columns * plan.block_h * slots / (16 * 64)
        chain = 2 * tiles * max(12, plan.block_b / 2)
    else:
        chain = 33 * wide * columns / (fma * plan.k_split)
        chain += 33 * wide * request.cell.gates * plan.block_h / fma
    if plan.programs == 1:
        return local + chain
    kept = request.cell.gates * plan.block_h * columns * operand_bytes(request, limits)
    hop = 2 * (1000 * limits.hop_us * limits.clock + 300)
    part = request.itemsize if plan.joined else 4
    exchange = columns * plan.block_b * (request.itemsize + 2 * part) / L2_BYTES
    if plan.regime == "streamed":
        kept = request.cell.gates * plan.block_h * columns * request.itemsize
        all_weights = plan.programs * kept
        fits = all_weights < limits.l2 * 2**20
        from_memory = 0 if fits else all_weights / (limits.memory * 1000 / limits.clock)
        weights = 2 * max(kept / L2_BYTES, from_memory)
    elif plan.joined:
        weights = 0.0
    else:
        # Registers hold more than what is needed where slices of 8 units are padded to 16 rows.
        left = max(0, kept - 128 * plan.weight_registers * plan.warps)
        weights = 2 * left / (SHARED_BYTES * plan.warps)
    return local + chain + hop + exchange + weights


def _full_precision(request: PlanRequest, plan: Plan, limits: Limits, columns: int) -> float:
    """Cycles of the products of both sweeps in full fp32."""
    rows = request.cell.gates * plan.block_h
    if limits.fp32_mma or plan.regime == "streamed":
        # A multiply-add per thread and cycle, four warps at a time.
        return 2 * rows * columns * plan.block_b / 128
    busy = 7 * 6 * rows * columns * plan.block_b / (16 * 8 * 16) / 4
    dependent = 33 * 3 * (plan.block_b // 8) / 16  # for each element of a row
    last = min(2, request.cell.gates) * plan.block_h  # both halves of the gates at a time
    chain = max(busy, dependent * columns / plan.k_split) + max(busy, dependent * last)
    return chain + 5.5 * plan.block_b * plan.warps / 128 * (columns / plan.k_split + rows)


def _launches(request: PlanRequest, plan: Plan, limits: Limits) -> int:
    tiles = -(-request.B // plan.block_b)
    if plan.programs == 1:
        return -(-tiles * request.D // limits.sms)  # waves of one launch
    return -(-tiles // max(1, plan.tiles)) * -(-request.D // max(1, plan.directions))
