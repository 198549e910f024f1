"""The sweeps of groups: all programs of a launch run concurrently in Triton's interpreter.

Most plans are made by hand, so that small sizes meet what the planner gives to large ones.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from concurrent_interpreter import Hang, concurrent_grid
from helpers import plan_request
from sweep_oracle import CELLS, Problem, check_sweeps, group_plan
from triton.runtime import interpreter

from fused_rnn.kernels import backward, forward, group, planner, variants
from fused_rnn.kernels.chips import LIMITS
from fused_rnn.kernels.planner import plans

if not triton.knobs.runtime.interpret:
    pytest.skip("Triton was imported without TRITON_INTERPRET=1", allow_module_level=True)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _unchecked_sums(monkeypatch):
    """No checks for overflow: none is near in sizes like these, and they cost a third."""
    options = interpreter.interpreter_builder.options
    unchecked = replace(options, sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", unchecked)


def run(p: Problem, plan, seed=0, saves=(True,)):
    """Both sweeps against the oracle.

    The seed decides in which order the programs run and in which their stores arrive. A hang is
    found at once: the timeout is for accidents.
    """
    assert plan.programs > 1
    with concurrent_grid(seed, timeout=600):
        got, want = check_sweeps(p, plan, "ieee", use_c_seq=True, saves=saves)
    for name, x in got.items():
        by_unit(x, want[name], p.H, name)
    return got


def by_unit(got, want, H, what):
    """A unit that is left out is small in a maximum over all, but it is 100% wrong itself."""
    if what == "dgates":
        got, want = got.movedim(2, -1), want.movedim(2, -1)
    error, size = (x.double().reshape(-1, H).square().mean(0).sqrt() for x in (got - want, want))
    wrong = (~(error <= 0.1 * size + 0.01)).nonzero().flatten().tolist()
    assert not wrong, f"{what}: units {wrong}"


@dataclass
class Case:
    H: int
    B: int = 3
    T: int = 2
    D: int = 1
    packed: bool = False
    plan: dict[str, Any] = field(default_factory=dict)


STREAMED = {"regime": "streamed"}
JOINED = {"joined": True, "block_k": 16}
CASES = {
    # Members of a group; of the last one, from 1 to all 16 units exist.
    "2_programs": Case(17, T=1),
    "3_programs": Case(48),
    "4_programs": Case(49),
    "5_programs": Case(79, T=1, plan={"block_k": 64}),
    "6_programs": Case(90, T=1, plan={"block_k": 64}),
    "7_programs": Case(97, T=1, plan={"block_k": 64}),
    "8_programs": Case(127, T=1, plan={"block_k": 64}),
    # Tiles of weights along H, of which `chunks` are in registers and the others in shared memory.
    "1_tile": Case(23, T=3, plan={"block_k": 64}),
    "2_tiles": Case(27, T=3, plan={"block_k": 16}),
    "3_tiles": Case(41, plan={"block_k": 16, "block_h": 32}),
    "5_tiles": Case(75, plan={"block_k": 16, "block_h": 64}),
    "8_tiles": Case(117, plan={"block_k": 16, "block_h": 64}),
    "shared_0_of_1": Case(31, T=3, plan={"chunks": 0}),
    "shared_0_of_2": Case(33, plan={"block_h": 32, "chunks": 0}),
    "shared_1_of_3": Case(41, plan={"block_k": 16, "block_h": 32, "chunks": 1}),
    "shared_4_of_5": Case(67, plan={"block_k": 16, "block_h": 64, "chunks": 4}),
    # Slices of columns and of rows in a batched dot.
    "split_2_1": Case(33, T=3, plan={"block_h": 32, "k_split": 2}),
    "split_4_1": Case(21, plan={"block_k": 64, "k_split": 4}),
    "split_8_1": Case(33, plan={"block_k": 64, "block_h": 32, "k_split": 8}),
    "split_1_2": Case(45, plan={"block_k": 16, "block_h": 32, "m_split": 2}),
    "split_1_4": Case(19, plan={"block_k": 16, "m_split": 4}),
    "split_2_2": Case(43, plan={"block_h": 32, "k_split": 2, "m_split": 2}),
    "split_4_2": Case(57, plan={"block_k": 64, "block_h": 32, "k_split": 4, "m_split": 2}),
    "split_2_4": Case(77, plan={"block_h": 64, "k_split": 2, "m_split": 4, "chunks": 1}),
    # All gates in one tile, which is wgmma on sm_90, and h in more chunks than are under way.
    "joined": Case(33, T=3, plan=JOINED),
    "joined_shared_1_of_3": Case(41, plan=JOINED | {"block_h": 32, "chunks": 1}),
    "joined_shared_0_of_5": Case(75, plan=JOINED | {"chunks": 0}),
    "joined_wide_packed": Case(19, 17, D=2, packed=True, plan=JOINED | {"block_b": 32}),
    "streamed": Case(40, plan=STREAMED),
    "streamed_multiples": Case(64, plan=STREAMED | {"block_h": 32}),
    "streamed_1_tile": Case(31, T=3, plan=STREAMED | {"block_k": 64}),
    "streamed_packed": Case(19, 9, D=2, packed=True, plan=STREAMED),
    # Groups: batch tiles, directions, and launches where not all fit one.
    "wide": Case(25, 9, plan={"block_b": 16}),
    "wide_packed": Case(17, 9, packed=True, plan={"block_b": 16}),
    "wide_2_groups": Case(25, 17, T=1, plan={"block_b": 16}),
    "3_groups": Case(29, 17),
    "4_groups": Case(29, 9, D=2),
    "4_groups_packed": Case(29, 9, D=2, packed=True),
    "3_launches": Case(19, 17, plan={"tiles": 1}),
    "4_uneven_launches": Case(19, 17, T=1, D=2, plan={"tiles": 2, "directions": 1}),
    "2_directions": Case(19, 9, D=2, plan={"directions": 1}),
    "2_directions_packed": Case(19, 9, D=2, packed=True, plan={"directions": 1}),
    "4_launches_packed": Case(19, 9, D=2, packed=True, plan={"tiles": 1, "directions": 1}),
}


def _with_cells(cases):
    """Each case with each cell; without the slow ones, cells take turns. So do dtypes."""
    for i, (label, case) in enumerate(cases.items()):
        for j, name in enumerate(CELLS):
            reverse = ((i // 4 + j) % 2 == 1,) if case.D == 1 else (False, True)
            marks = () if i % 4 == j else pytest.mark.slow
            args = name, DTYPES[i % 3], reverse, case
            yield pytest.param(*args, id=f"{name}-{label}", marks=marks)


@pytest.mark.parametrize(("name", "dtype", "reverse", "case"), list(_with_cells(CASES)))
def test_sweeps(name, dtype, reverse, case):
    p = Problem(name, dtype, case.H, case.B, case.T, reverse, case.packed)
    run(p, group_plan(p, **case.plan), seed=case.H)


def _some_quick(first):
    """All pairs with a cell; those that are not slow have each cell at least once."""
    for i, x in enumerate(first):
        for j, name in enumerate(CELLS):
            marks = () if i == j % len(first) else pytest.mark.slow
            yield pytest.param(x, name, id=f"{name}-{x}", marks=marks)


@pytest.mark.parametrize(("H", "name"), list(_some_quick([129, 200, 257])))
def test_many_units(H, name):
    """A kernel elsewhere dropped the units beyond 128, unnoticed."""
    p = Problem(name, torch.float16, H, 1, 2, (H == 200,))
    run(p, group_plan(p, block_h=128, block_k=64 if H == 257 else 32))


def as_planned(p: Problem, target, precision="tf32"):
    """Plans of the planner with groups: the best, and the best with weights in another place."""
    request = plan_request(p.name, p.H, p.dtype, p.layout.B, len(p.reverse), precision, fast=False)
    groups = [plan for plan in plans(request, LIMITS[target]) if plan.programs > 1]
    return {plan.weights: plan for plan in reversed(groups)}.values()


@pytest.mark.parametrize(("target", "name"), list(_some_quick([80, 90, 100, 120])))
def test_as_planned(target, name):
    p = Problem(name, torch.bfloat16, 70, 1, 2)
    for plan in as_planned(p, target):
        run(p, plan)


@pytest.mark.slow
@pytest.mark.parametrize("name", CELLS)
def test_many_units_as_planned(name):
    p = Problem(name, torch.bfloat16, 300, 3, 2, (False, True))
    for plan in as_planned(p, 90):
        run(p, plan)


@pytest.mark.parametrize("name", CELLS)
def test_full_fp32_as_planned(name):
    """Groups of 8 units each, too; in the interpreter fp32 is not in parts."""
    p = Problem(name, torch.float32, 65 if name in ("gru", "lstm") else 150, 1, 1)
    for plan in as_planned(p, 86, "ieee"):
        assert plan.regime == "cooperative"
        run(p, plan)


@pytest.mark.parametrize("name", CELLS)
def test_streamed_as_planned(name):
    """With tiles that the planner gives to sizes beyond the chip."""
    p = Problem(name, torch.float32, 65 if name in ("gru", "lstm") else 150, 1, 1)
    request = plan_request(p.name, p.H, p.dtype, 1, 1, "ieee", fast=False)
    run(p, min(planner._streamed(request, LIMITS[86]), key=lambda plan: plan.step_us))


@pytest.mark.parametrize(
    ("name", "H"),
    [("rnn_tanh", 33), *(pytest.param(c, 70, marks=pytest.mark.slow) for c in CELLS)],
)
def test_any_schedule_has_the_same_result(name, H):
    """To the last bit: partial sums of three programs and more are added in a fixed order."""
    p = Problem(name, torch.float16, H, 3, 2)
    plan = group_plan(p, block_k=128)
    first, *others = (run(p, plan, seed) for seed in range(20))
    for other in others:
        assert all(torch.equal(x, other[key]) for key, x in first.items())


def test_inference():
    """Without saving, a group has the same result and leaves the gates alone."""
    p = Problem("lstm", torch.bfloat16, 20, 3, 2)
    run(p, group_plan(p), saves=(False, True))


# The tests of these tests: what is wrong is found.


def test_missing_program(monkeypatch):
    """Who waits for a program that does not exist is named, with the step."""

    def wrong(plan, *more):
        return right(plan, *more) | {"PROGRAMS": plan.programs + 1}

    right = variants.sweep_constants
    p = Problem("gru", torch.float16, 17, 1, 2)
    plan = group_plan(p)
    monkeypatch.setattr(variants, "sweep_constants", wrong)
    monkeypatch.setattr(variants, "VARIANTS", {})
    with pytest.raises(Hang) as error:
        run(p, plan)
    for program in range(2):
        error.match(rf"program \({program}, 0, 0\), step 0, group.py:\d+ in wait, .* hangs")


def test_unwritten_memory():
    """With a program less, nobody writes h and dh of its units: what is read then is poison."""
    p = Problem("lstm", torch.float16, 33, 3, 3)
    plan = group_plan(p)
    with pytest.raises(AssertionError, match="is not finite"):
        run(p, replace(plan, programs=2))


@triton.jit
def wait_for_nobody(counters, step, programs, BLOCK_BARRIER: tl.constexpr):
    tl.debug_barrier()


@triton.jit
def arrive_relaxed(counters, step, BLOCK_BARRIER: tl.constexpr):
    tl.debug_barrier()
    tl.atomic_add(counters + (step % 2) * group.LINE, 1, sem="relaxed", scope="gpu")


@pytest.mark.parametrize("module", [forward, backward], ids=["forward", "reverse"])
@pytest.mark.parametrize("wrong", [wait_for_nobody, arrive_relaxed])
def test_wrong_barrier(module, wrong, monkeypatch):
    name = wrong.__name__.split("_")[0]
    monkeypatch.setattr(module, name, wrong)
    p = Problem("rnn_tanh", torch.float32, 17, 1, 2)

    def fails(seed):
        try:
            run(p, group_plan(p), seed)
        except AssertionError:
            return True
        return False

    assert any(fails(seed) for seed in range(20))
