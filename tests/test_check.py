"""`python -m fused_rnn.check`: what is green, hangs and crashes, what is remembered."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_rnn import explain
from fused_rnn.engines.triton import plans
from fused_rnn.kernels.chips import LIMITS
from fused_rnn.tools.check import child
from fused_rnn.tools.check import rows as check_rows
from fused_rnn.tools.check.command import main
from fused_rnn.tools.check.measure import (
    Error,
    allowed,
    inputs,
    layers,
    ran,
    run,
    set_precision,
    worst,
)
from fused_rnn.tools.check.rows import CELLS, DTYPES, SIZES, Row, gpu_rows

ROOT = Path(__file__).parent.parent
SPEEDS = [k for k in child.UNKNOWN if k.endswith(("_us", "_ratio"))]
CPU = torch.device("cpu")


def faulty(capsys: pytest.CaptureFixture[str], *more: str, **faults: str) -> tuple[int, Any]:
    """The exit status and the JSON of a run whose layers have faults."""
    command = [sys.executable, str(ROOT / "tests" / "check_worker.py"), json.dumps(faults)]
    status = main(["--json", *more], command)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    return status, json.loads(lines[0])


# ---- the bound ----------------------------------------------------------------------------------


def test_the_bound() -> None:
    eps = 2**-7  # of bf16
    assert allowed(0.0, 0.0, torch.float32) == 1e-5
    assert allowed(0.0, 0.0, torch.float64) == 1e-11
    assert math.isclose(allowed(0.01, 4.0, torch.bfloat16), 0.02 + 4 * eps + 1e-5)
    assert Error("dx", 0.02, 0.01, 0.02).right
    assert not Error("dx", math.nextafter(0.02, 1), 0.01, 0.02).right
    assert not Error("dx", math.nan, 0.01, 0.02).right
    assert not Error("dx", 0.01, math.nan, math.nan).right


@pytest.mark.parametrize("share", [0.99, 1.01])
def test_just_within_and_just_beyond(share: float) -> None:
    exact = {"output": torch.tensor([1.0, -2.0]).double(), "dx": torch.tensor([4.0]).double()}
    theirs = {"output": torch.tensor([1.0, -2.0]), "dx": torch.tensor([4.5])}
    eps = torch.finfo(torch.float32).eps
    ours = {**theirs, "dx": (exact["dx"] + share * (2 * 0.5 + 4 * eps + 1e-5)).float()}
    error = worst(ours, [theirs], exact)
    assert (error.where, error.theirs) == ("dx", 0.5)
    assert error.right is (share < 1)


def test_the_worst_is_what_is_furthest_beyond() -> None:
    exact = {name: torch.zeros(2).double() for name in ("output", "dx", "dw_ih")}
    theirs = {name: torch.zeros(2) for name in exact}
    found = {**theirs, "output": torch.tensor([0.0, 0.1]), "dx": torch.tensor([0.2, 0.0])}
    assert worst(found, [theirs], exact).where == "dx"
    assert worst({**found, "dw_ih": torch.tensor([math.nan, 0])}, [theirs], exact).where == "dw_ih"
    larger = {**theirs, "dx": torch.tensor([0.15, 0.0])}  # of a loop in TF32, say
    assert worst(found, [theirs, larger], exact).where == "output"
    with pytest.raises(ValueError, match="output is"):
        worst({**found, "output": torch.zeros(1)}, [theirs], exact)


@pytest.mark.parametrize(("I", "H"), [(4, 10), (16, 64), (32, 64), (64, 32), (64, 1024)])
def test_units_of_a_relu_stay_on_their_side(I: int, H: int) -> None:
    row = Row("rnn_relu", "fp32", "sweeps", T=32, B=16, I=I, H=H, timed_steps=0)
    exact = layers(row)[0]
    out, h_0 = run(exact, *inputs(row), CPU)["output"], inputs(row)[1][0].double()
    x, before = inputs(row)[0].double(), torch.cat([h_0, out[:-1]])
    w: Any = exact
    pre = x @ w.weight_ih_l0.T + before @ w.weight_hh_l0.T + w.bias_ih_l0 + w.bias_hh_l0
    torch.testing.assert_close(pre.relu(), out)
    assert pre.abs().min() > 0.25  # bf16 rounds a 4 by 2^-7


# ---- what is checked ----------------------------------------------------------------------------


def planner(gpu: int | str) -> check_rows.PlanOf:
    return lambda request: plans.planned(request, LIMITS[gpu])[0]  # type: ignore[index]


@pytest.fixture
def _precision() -> Iterator[None]:
    before = torch.backends.cudnn.rnn.fp32_precision
    yield
    torch.backends.cudnn.rnn.fp32_precision = before


@pytest.mark.usefixtures("_precision")
@pytest.mark.parametrize("how", [{}, {"quick": True}, {"every": True}, {"emulated": True}], ids=str)
@pytest.mark.parametrize("gpu", [80, 90, "gfx942"])
def test_the_planner_takes_the_regime_of_a_row(gpu: int | str, how: dict[str, bool]) -> None:
    rows = list(gpu_rows(planner(gpu), **how))
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        set_precision(row.precision)
        layer = CELLS[row.cell][1](
            row.I,
            row.H,
            dtype=DTYPES[row.dtype],
            device="meta",
            backend=row.backend,
            **CELLS[row.cell][2],
        )
        x = torch.empty(row.T, row.B, row.I, dtype=DTYPES[row.dtype], device="meta")
        (found,) = explain(layer, x, gpu)
        assert ran(found.backend, found.reason) == row.wanted, row


@pytest.mark.parametrize("gpu", [80, 90])
def test_each_two_of_cell_type_and_regime_meet(gpu: int) -> None:
    rows = list(gpu_rows(planner(gpu)))
    types, regimes = ("fp32", "tf32", "fp16", "bf16"), list(SIZES)
    assert {(r.cell, r.dtype) for r in rows} == {(c, d) for c in CELLS for d in types}
    assert {(r.cell, r.wanted) for r in rows} == {(c, r) for c in CELLS for r in regimes}
    possible = {(d, r) for d in types for r in regimes}
    assert {(r.dtype, r.wanted) for r in rows} == possible
    assert len(list(gpu_rows(planner(gpu), every=True))) == 4 * len(possible)
    quick = [(r.dtype, r.wanted) for r in gpu_rows(planner(gpu), quick=True)]
    assert quick == [("bf16", "persistent"), ("fp16", "cooperative"), ("fp32", "cooperative")]


def test_a_chip_without_groups() -> None:
    rows = list(gpu_rows(planner("gfx942")))
    assert {(r.cell, r.dtype, r.wanted) for r in rows} == {
        (c, d, "persistent") for c in CELLS for d in ("fp32", "tf32", "fp16", "bf16")
    }


def test_in_an_emulator_nothing_is_timed_and_nothing_has_tf32() -> None:
    rows = list(gpu_rows(planner(90), emulated=True, every=True))
    assert {r.timed_steps for r in rows} == {0}
    assert {r.backend for r in rows} == {"triton"}
    assert {r.dtype for r in rows} == {"fp32", "fp16", "bf16"}
