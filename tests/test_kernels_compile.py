"""The compiled sweeps hold the plan's promises: no spill, nothing of the weights read in the loop.

Compiling needs no GPU, but it needs Triton without its interpreter: another process.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from fused_rnn.kernels.plan import LIMITS, SPECS, DoesNotFit, make_plan

ROOT = Path(__file__).parents[1]
# (kernel, cell, H) -> most instructions and barriers per warp and step; bf16, sm_80 and sm_90.
BUDGET = {
    ("inference", "lstm", 128): (205, 6),
    ("forward", "lstm", 128): (260, 10),
    ("reverse", "lstm", 128): (415, 12),
    ("forward", "gru", 128): (230, 8),
    ("reverse", "gru", 128): (350, 12),
    ("forward", "rnn_tanh", 128): (100, 6),
    ("reverse", "rnn_tanh", 128): (125, 8),
    ("forward", "rnn_tanh", 256): (135, 6),
    ("reverse", "rnn_tanh", 256): (190, 8),
}
# Bytes of stack that are left although the plan says registers. None of them lies in the sizes of
# BUDGET; each is to go, and none is to come.
KNOWN_SPILLS = {
    ("forward", "rnn_relu", "tf32", 64, "86"): 8,
    ("reverse", "lstm", "bf16", 96, "120"): 8,
}


def static(tmp_path, *arguments):
    """Rows of `python -m bench.static`."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = tmp_path / "rows.json"
    command = [sys.executable, "-m", "bench.static", "--json", str(out), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in out.read_text().splitlines()]


def check(row):
    limits = next(v for k, v in LIMITS.items() if str(k) == row["target"])
    itemsize = 4 if "32" in row["dtype"] else 2
    precision = "ieee" if row["dtype"] == "fp32" else "tf32"
    plan = make_plan(row["cell"], row["hidden"], itemsize, 8, 1, limits, precision=precision)
    what = " ".join(str(row[k]) for k in ("kernel", "cell", "dtype", "hidden", "target"))
    assert row["shared"] <= plan.shared <= limits.shared, f"{what}: {row['shared']} bytes of shared"
    assert row["registers"] <= limits.registers, what
    assert row["weights_global"] == 0, f"{what} reads weights from global memory"
    if plan.weights == "registers":
        key = tuple(row[k] for k in ("kernel", "cell", "dtype", "hidden", "target"))
        assert row["spill"] <= KNOWN_SPILLS.get(key, 0), f"{what} spills {row['spill']} bytes"
        assert row["weights_shared"] == 0, f"{what} reads weights from shared memory"
    if itemsize == 2:
        assert row["hgmma"] <= 0, f"{what} is on wgmma or tcgen05"
    most = BUDGET.get((row["kernel"], row["cell"], row["hidden"]))
    if most and row["dtype"] == "bf16" and row["target"] in ("80", "90"):
        assert row["instr"] <= most[0], f"{what}: {row['instr']} instructions"
        assert row["bar"] <= most[1], f"{what}: {row['bar']} barriers"


@pytest.mark.parametrize("target", [str(t) for t in LIMITS])
def test_every_target(target, tmp_path):
    """The largest size of the cell with most registers."""
    rows = static(tmp_path, "--target", target, "--cell", "lstm", "--hidden", "128")
    assert len(rows) == 3
    for row in rows:
        check(row)


@pytest.mark.parametrize("cell", ["gru", "rnn_tanh"])
def test_budget(cell, tmp_path):
    """The largest size of the other cells; LSTM's is in the test above."""
    hidden = "256" if cell == "rnn_tanh" else "128"
    for row in static(tmp_path, "--target", "90", "--cell", cell, "--hidden", hidden):
        check(row)


CELLS, TARGETS = list(SPECS), [str(t) for t in LIMITS]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "cell"), [(t, CELLS[(i + j) % 4]) for i, t in enumerate(TARGETS) for j in (0, 2)]
)
def test_turns(target, cell, tmp_path):
    """Cells, targets, dtypes and sizes, no powers of two among them, take turns."""
    turn = list(SPECS).index(cell) + [str(t) for t in LIMITS].index(target)
    hidden = ("16", "33", "64", "96", "128")[turn % 5]
    dtype = ("bf16", "fp16", "tf32", "fp32")[turn % 4]
    if "32" in dtype and int(hidden) > 64:
        hidden = "40"
    args = "--target", target, "--cell", cell, "--dtype", dtype, "--hidden", hidden
    rows = static(tmp_path, *args, "--kernel", "forward", "reverse")
    assert len(rows) == 2
    for row in rows:
        check(row)


@pytest.mark.parametrize("limits", LIMITS.values(), ids=str)
@pytest.mark.parametrize("cell", SPECS)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_plan_fits(limits, cell, itemsize):
    """Every plan fits the chip; past the largest H there is a reason instead of a plan."""
    fits = []
    for H in range(1, 513):
        try:
            plan = make_plan(cell, H, itemsize, 8, 1, limits)
        except DoesNotFit:
            continue
        fits.append(H)
        assert plan.block_h >= H
        assert plan.block_h % (16 * plan.warps) == 0
        assert plan.weight_registers < limits.registers
        assert plan.shared <= limits.shared
        assert plan.batch in (1, plan.warps)
        assert not (plan.fast and itemsize == 4)
    assert fits == list(range(1, len(fits) + 1))
    assert len(fits) >= (64 if itemsize == 4 else 128)
