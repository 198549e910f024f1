"""The planner: every plan fits its chip, covers all units, sequences, directions, and is resident.

The rules are computed here once more, from the chip's limits and not by the planner's functions.
"""

from collections import Counter
from dataclasses import replace

import pytest
from helpers import plan_request
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fused_rnn.cells.builtin import CELLS
from fused_rnn.kernels.chips import LIMITS
from fused_rnn.kernels.plan import DoesNotFit, Plan
from fused_rnn.kernels.planner import MOST_CHUNKS, make_plan, plans

PRECISIONS = {"bf16": (2, "tf32"), "tf32": (4, "tf32"), "fp32": (4, "ieee")}
GROUPS = {str(t): limits for t, limits in LIMITS.items() if limits.groups}
K = 1024

cells = st.sampled_from(list(CELLS))
dtypes = st.sampled_from(list(PRECISIONS))
# Half of them within one program, and many beside a multiple of a tile.
sizes = st.one_of(
    st.integers(1, 256),
    st.integers(1, 4096),
    st.builds(lambda n, d: min(4096, max(1, 32 * n + d)), st.integers(0, 128), st.integers(-1, 1)),
)


def all_plans(cell, dtype, H, B, D, limits, fast=True):
    itemsize, precision = PRECISIONS[dtype]
    return plans(plan_request(cell, H, itemsize, B, D, precision, fast), limits)


def power_of_two(n):
    return n > 0 and n & (n - 1) == 0


def check(plan, cell, dtype, H, B, D, limits):
    gates, itemsize = CELLS[cell].kernels.gates, PRECISIONS[dtype][0]
    parts = dtype == "fp32" and limits.target != "gfx942"  # of bf16, three of them
    if parts and plan.regime != "streamed":
        itemsize = 6

    # Tiles are what Triton can have, and cover every unit once.
    tiles = plan.block_h, plan.block_k, plan.block_b, plan.warps, plan.k_split, plan.m_split
    assert all(map(power_of_two, tiles))
    assert (plan.programs - 1) * plan.block_h < H <= plan.programs * plan.block_h
    count = -(-H // plan.block_k)
    assert 0 <= plan.chunks <= count
    assert (plan.regime == "persistent") == (plan.programs == 1)
    assert (plan.regime == "streamed") == (plan.weights == "L2")
    if plan.regime == "persistent":
        assert plan.block_k == plan.block_h
    else:
        assert plan.work == pytest.approx(
            plan.programs * plan.block_h * count * plan.block_k / H**2
        )
    if plan.regime == "cooperative":
        assert count <= MOST_CHUNKS or plan.joined
        where = {0: "shared", count: "registers"}.get(plan.chunks, "registers and shared")
        assert plan.weights == where

    # Each warp has a slice of a batched dot; mma takes 16 rows of it at least, or two parts of 8.
    split = plan.k_split * plan.m_split
    assert split in (1, plan.warps)
    assert plan.block_k // split >= (8 if parts else 16) or split == 1
    assert plan.block_h % plan.m_split == 0

    # It fits.
    assert plan.block_b in ((16, 32) if plan.joined else (8, 16))
    if plan.joined:  # a tile of 128 rows, 16 for each warp, in both sweeps
        assert limits.wgmma
        assert itemsize == 2
        assert CELLS[cell].kernels.slots * plan.block_h == plan.block_k == 16 * plan.warps == 128
    assert plan.warps <= limits.warps
    assert plan.weight_registers < limits.registers
    assert plan.shared <= limits.shared
    rows = (CELLS[cell].kernels.slots if plan.joined else gates) * plan.block_h
    resident = rows * plan.block_k * itemsize
    if plan.regime == "cooperative":
        assert plan.weight_registers * 4 * limits.warp * plan.warps >= plan.chunks * resident
        assert plan.shared >= (count - plan.chunks) * resident
    assert not plan.fast or (dtype == "bf16" and limits.fast_tanh)

    # Every batch tile of every direction is in one launch, all of whose programs are resident.
    todo = Counter((t, d) for t in range(-(-B // plan.block_b)) for d in range(D))
    launches = list(plan.launches(B, D))
    done = Counter(
        (t0 + t, d0 + d) for t0, n, d0, m in launches for t in range(n) for d in range(m)
    )
    assert done == todo
    if plan.programs > 1:
        by_registers = 65536 // (256 * 32 * plan.warps)  # as if each thread had 256
        by_shared = limits.sm_shared // (plan.shared + K)  # the system takes 1 KiB of each
        room = limits.sms * min(by_registers, by_shared)
        assert plan.tiles * plan.directions * plan.programs <= room
        assert all(plan.programs * n * m <= room for _, n, _, m in launches)


@settings(max_examples=400)
@given(cells, dtypes, sizes, st.integers(1, 512), st.integers(1, 2), st.sampled_from(list(GROUPS)))
@example("lstm", "bf16", 1, 1, 1, "80")
@example("lstm", "bf16", 4096, 512, 2, "86")  # one group after the other
@example("gru", "tf32", 2688, 1, 2, "86")
@example("gru", "fp32", 4096, 17, 2, "90")
@example("rnn_relu", "tf32", 4096, 512, 1, "120")
def test_every_plan(cell, dtype, H, B, D, target):
    case = cell, dtype, H, B, D, GROUPS[target]
    found = all_plans(*case)
    for plan in found:
        check(plan, *case)
    assert [plan.step_us for plan in found] == sorted(plan.step_us for plan in found)
    itemsize, precision = PRECISIONS[dtype]
    request = plan_request(cell, H, itemsize, B, D, precision)
    assert make_plan(request, GROUPS[target]) == found[0]
    assert len(set(found)) == len(found)


# Largest sizes, and up to them the most work of a group, padded over needed.
PADDING = {96: 2.43, 128: 1.53, 192: 1.67, 1088: 1.59}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_padding(cell, dtype):
    """What pads more than the smallest tiles do is guessed to be faster, and within bounds."""
    for H in (*range(64, 320), *range(320, 1088, 31)):
        for target in ("86", "90"):
            best, *others = all_plans(cell, dtype, H, 8, 1, GROUPS[target])
            least = -(-H // 16) * 16 * -(-H // 32) * 32 / H**2
            if best.programs > 1:
                most = next(work for size, work in PADDING.items() if size >= H)
                assert best.work <= most, f"H = {H} on {target}: {best}"
            if best.programs > 1 and best.work > max(1.35, least):
                fewer = [plan for plan in others if plan.work <= max(1.35, least)]
                assert fewer, f"H = {H} on {target}: no plan pads little"
                assert best.step_us < min(plan.step_us for plan in fewer)


@pytest.mark.parametrize(
    ("cell", "dtype", "H", "block_k"),
    [
        ("lstm", "tf32", 72, 128),
        ("gru", "tf32", 72, 128),
        ("lstm", "bf16", 130, 64),
        ("gru", "bf16", 130, 64),
        ("lstm", "tf32", 130, 64),
        ("lstm", "bf16", 194, 256),
        ("lstm", "tf32", 194, 256),
    ],
)
@pytest.mark.parametrize("target", ["80", "90"])
def test_four_warps_pad_more_than_two(cell, dtype, H, block_k, target):
    """On sm_90 they take 9 to 32% fewer cycles by estimates, see docs/capacity.md."""
    plan = all_plans(cell, dtype, H, 8, 1, GROUPS[target])[0]
    assert (plan.block_h, plan.block_k, plan.warps) == (16, block_k, 4)
    assert plan.weights == "registers"


@pytest.mark.parametrize("limits", LIMITS.values(), ids=lambda limits: str(limits.target))
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_one_program(cell, dtype, limits):
    """Without groups, all sizes up to a largest one fit, and beyond it there is a reason."""
    alone = replace(limits, groups=False)
    refusal, last = None, 0
    for H in range(1, 321):
        try:
            (plan,) = all_plans(cell, dtype, H, 8, 1, alone)
        except DoesNotFit as reason:  # noqa: PERF203
            refusal = str(reason)
            assert f"{cell} with H = {H} needs" in refusal
            assert "KiB" in refusal
            assert "group" in refusal
        else:
            assert refusal is None
            check(plan, cell, dtype, H, 8, 1, alone)
            last = H
    assert {"bf16": 128, "tf32": 64, "fp32": 32}[dtype] <= last <= 256


@given(cells, dtypes, st.integers(257, 4096), st.integers(1, 512))
def test_amd_beyond_one_program(cell, dtype, H, B):
    with pytest.raises(DoesNotFit, match=f"{cell} with H = {H} needs .*group"):
        all_plans(cell, dtype, H, B, 1, LIMITS["gfx942"])


@pytest.mark.parametrize(
    ("cell", "dtype", "H", "regime"),
    [
        ("lstm", "bf16", 32, "persistent"),
        ("rnn_tanh", "bf16", 128, "persistent"),
        ("lstm", "bf16", 512, "cooperative"),
        ("gru", "tf32", 256, "cooperative"),
        ("lstm", "bf16", 4096, "streamed"),
        ("lstm", "fp32", 64, "persistent"),
        ("gru", "fp32", 512, "cooperative"),
        ("lstm", "fp32", 2048, "streamed"),
    ],
)
def test_regime(cell, dtype, H, regime):
    assert all_plans(cell, dtype, H, 8, 1, LIMITS[90])[0].regime == regime


PLAN = Plan(
    regime="cooperative",
    block_h=16,
    block_k=128,
    block_b=8,
    warps=4,
    k_split=4,
    m_split=1,
    programs=32,
    tiles=4,
    directions=1,
    chunks=4,
    fast=True,
    weights="registers",
    weight_registers=128,
    shared=40 * K,
    work=1.0,
    step_us=5.0,
)


def test_text():
    text = "cooperative: 16 units x 8 sequences in 4 warps, weights in registers"
    text += ", groups of 32 programs, up to 4 batch tiles a launch"
    assert str(PLAN) == text
    one = replace(PLAN, regime="persistent", block_h=128, warps=8, programs=1, tiles=0)
    assert str(one) == "persistent: 128 units x 8 sequences in 8 warps, weights in registers"


def test_launches():
    """Batch tiles that do not fit one launch go into the next, and so do directions."""
    assert list(PLAN.launches(B=8, D=1)) == [(0, 1, 0, 1)]
    assert list(PLAN.launches(B=9 * 8 - 7, D=2)) == [
        (0, 4, 0, 1),
        (4, 4, 0, 1),
        (8, 1, 0, 1),
        (0, 4, 1, 1),
        (4, 4, 1, 1),
        (8, 1, 1, 1),
    ]
    assert list(replace(PLAN, tiles=0, directions=2).launches(B=17, D=2)) == [(0, 3, 0, 2)]


# Microseconds per step of both time loops in bf16 on an H100, as in bench/results/raw: cell, H, B.
MEASURED = {
    ("lstm", 256, 32): 3.364,
    ("gru", 256, 32): 3.265,
    ("lstm", 512, 32): 4.021,
    ("lstm", 512, 1): 3.569,
    ("lstm", 768, 16): 4.676,
    ("lstm", 1024, 32): 8.223,
}


@pytest.mark.parametrize(("cell", "H", "B"), MEASURED)
def test_guesses_for_groups_are_near_what_was_measured(cell, H, B):
    plan = make_plan(plan_request(cell, H, 2, B), LIMITS[90])
    assert plan.weights == "registers"
    assert plan.step_us == pytest.approx(MEASURED[cell, H, B], rel=0.11)


def test_joined_gates():
    """On an H200 both time loops took 11.8 us for 128 sequences in bf16, and others 26 or more.

    For fewer sequences, or where nothing was measured of it, plans are as they were.
    """
    for cell in ("lstm", "gru"):
        plan = make_plan(plan_request(cell, 1024, 2, 128), LIMITS[90])
        assert (plan.joined, plan.programs, plan.block_b) == (True, 32, 32)
        assert list(plan.launches(128, 1)) == [(0, 4, 0, 1)]
        assert plan.step_us == pytest.approx(11.8, rel=0.11)
        assert "gates joined" in str(plan)
    for cell, H, B in MEASURED:
        assert not make_plan(plan_request(cell, H, 2, B), LIMITS[90]).joined
    for target in (80, 100):
        found = plans(plan_request("lstm", 1024, 2, 128), LIMITS[target])
        assert not any(plan.joined for plan in found)


@pytest.mark.parametrize(("H", "block_h"), [(129, 16), (200, 16), (256, 16), (512, 8)])
def test_slices_of_an_rnn_in_full_fp32(H, block_h):
    """Weights padded to 16 rows cost no less than others: slices of 8 had been guessed too low."""
    plan = all_plans("rnn_tanh", "fp32", H, 8, 1, GROUPS["90"])[0]
    assert plan.block_h == block_h
