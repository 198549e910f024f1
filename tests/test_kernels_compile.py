"""The compiled sweeps hold the plan's promises: no spill, nothing of the weights read in the loop.

Compiling needs no GPU, but it needs Triton without its interpreter: another process.
"""

import ast
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from helpers import plan_request

pytest.importorskip("triton")

from fused_rnn.cells.builtin import CELLS
from fused_rnn.kernels.chips import LIMITS
from fused_rnn.kernels.planner import make_plan

ROOT = Path(__file__).parents[1]
# (kernel, cell, H) -> most instructions and barriers per warp and step; bf16, sm_80 and sm_90.
BUDGET = {
    ("inference", "lstm", 128): (205, 6),
    ("forward", "lstm", 128): (255, 10),
    ("reverse", "lstm", 128): (415, 12),
    ("forward", "gru", 128): (230, 8),
    ("reverse", "gru", 128): (350, 12),
    ("forward", "rnn_tanh", 128): (100, 6),
    ("reverse", "rnn_tanh", 128): (125, 8),
    ("forward", "rnn_tanh", 256): (135, 6),
    ("reverse", "rnn_tanh", 256): (190, 8),
    ("inference", "lstm", 256): (220, 5),
    ("forward", "lstm", 256): (220, 5),
    ("reverse", "lstm", 256): (260, 9),
    ("inference", "lstm", 512): (210, 5),
    ("forward", "lstm", 512): (230, 5),
    ("reverse", "lstm", 512): (355, 8),
    ("inference", "lstm", 1024): (225, 7),
    ("forward", "lstm", 1024): (260, 10),
    ("reverse", "lstm", 1024): (375, 9),
}
TRITON = tuple(map(int, version("triton").split(".")[:2]))
# Before Triton 3.9 a group's atomics bring no block barriers: each step has one more for each.
OLD = TRITON < (3, 9)
OWN_BARRIERS = 2 if OLD else 0
# Bytes: Triton 3.9 keeps wgmma's descriptors of shared memory in registers of threads.
JOINED_SPILL = 32 if OLD else 256
# Bytes: where most of the weights are in shared memory, some spill on their way there.
BEFORE_THE_LOOP = 64


def python(*arguments):
    """Output of Python in the root of the repository, where Triton compiles."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def static(tmp_path, *arguments):
    """Rows of `python -m bench.static`."""
    out = tmp_path / "rows.json"
    python("-m", "bench.static", "--json", str(out), *arguments)
    return [json.loads(line) for line in out.read_text().splitlines()]


def check(row):
    limits = next(v for k, v in LIMITS.items() if str(k) == row["target"])
    itemsize = 4 if "32" in row["dtype"] else 2
    precision = "ieee" if row["dtype"] == "fp32" else "tf32"
    request = plan_request(row["cell"], row["hidden"], itemsize, row["batch"], 1, precision)
    plan = make_plan(request, limits)
    what = " ".join(str(row[k]) for k in ("kernel", "cell", "dtype", "hidden", "target"))
    assert row["shared"] <= plan.shared <= limits.shared, f"{what}: {row['shared']} bytes of shared"
    assert row["registers"] <= limits.registers, what
    if plan.weights != "L2":
        assert row["weights_global"] == 0, f"{what} reads weights from global memory"
        if plan.joined:
            most = JOINED_SPILL
        elif plan.weights != "registers" and row["hidden"] > 1536:
            most = BEFORE_THE_LOOP
            assert row["spilled"] <= 0, f"{what} spills in the loop"
        else:
            most = 0
        assert row["spill"] <= most, f"{what} spills {row['spill']} bytes"
    if plan.weights == "registers":
        assert row["weights_shared"] == 0, f"{what} reads weights from shared memory"
    if itemsize == 2 and not plan.joined:
        assert row["hgmma"] <= 0, f"{what} is on wgmma or tcgen05"
    most = BUDGET.get((row["kernel"], row["cell"], row["hidden"]))
    if most and not plan.joined and row["dtype"] == "bf16" and row["target"] in ("80", "90"):
        assert row["instr"] <= most[0], f"{what}: {row['instr']} instructions"
        barriers = most[1] + (OWN_BARRIERS if row["programs"] > 1 else 0)
        assert row["bar"] <= barriers, f"{what}: {row['bar']} barriers"


# Those that compile as another one does, but for their sizes, are slow.
LIKE_OTHERS = ("86", "89", "100")
TARGETS = [
    pytest.param(name, marks=[pytest.mark.slow] if name in LIKE_OTHERS else [])
    for name in map(str, LIMITS)
]


@pytest.mark.parametrize("target", TARGETS)
def test_every_target(target, tmp_path):
    """The largest size of the cell with most registers."""
    rows = static(tmp_path, "--target", target, "--cell", "lstm", "--hidden", "128")
    assert len(rows) == 3
    for row in rows:
        check(row)


@pytest.mark.parametrize("target", ["80", "90"])
def test_groups(target, tmp_path):
    """Weights of a group in registers, LSTM."""
    hidden = ("512", "1024") if target == "80" else ("256", "512", "1024")
    args = "--target", target, "--cell", "lstm", "--hidden", *hidden
    rows = static(tmp_path, *args, "--kernel", "forward", "reverse")
    assert len(rows) == 2 * len(hidden)
    for row in rows:
        assert row["regime"] == "cooperative"
        check(row)


@pytest.mark.parametrize("cell", ["gru", pytest.param("lstm", marks=pytest.mark.slow)])
def test_joined_gates(cell, tmp_path):
    """A large batch on sm_90: wgmma takes weights from registers and, in place, shared memory."""
    args = "--target", "90", "--cell", cell, "--hidden", "1024", "--batch", "128"
    for row in static(tmp_path, *args, "--kernel", "forward", "reverse"):
        assert row["block_b"] == 32
        assert row["hgmma"] == 64  # of 64 rows and 16 columns, by each of two halves of the warps
        assert row["ldsm"] == 0
        assert row["weights_shared"] == 5 * 128 * 128 * 2  # five tiles of eight
        check(row)


def test_groups_that_pad(tmp_path):
    """Four warps with wide chunks, most of the last one beyond H."""
    args = "--target", "90", "--cell", "lstm", "--hidden", "130", "--dtype", "bf16", "tf32"
    rows = static(tmp_path, *args, "--kernel", "forward", "reverse")
    assert len(rows) == 4
    for row in rows:
        assert (row["programs"], row["warps"]) == (9, 4)
        check(row)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["86", "100", "120"])
def test_groups_elsewhere(target, tmp_path):
    """The other targets that have groups: another cell each, H no power of two."""
    cell = {"86": "gru", "100": "lstm", "120": "rnn_tanh"}[target]
    args = "--target", target, "--cell", cell, "--hidden", "300", "--dtype", "bf16", "tf32"
    rows = static(tmp_path, *args, "--kernel", "forward", "reverse")
    assert len(rows) == 4
    for row in rows:
        assert row["programs"] > 1
        check(row)


# One program, a group of 16 units each, one of 8: rows of 8 and 16 to a warp, forward and reverse.
# Others are compiled by the slow test below.
FULL = [("90", "lstm", 64), ("80", "lstm", 512), ("120", "gru", 512)]


def check_full(rows):
    for row in rows:
        check(row)
        assert row["regime"] != "streamed"
        assert row["weights_shared"] == row["hgmma"] == 0, row
        assert row["spill"] <= 0, row
        assert row["hmma"] > 0


@pytest.mark.parametrize(("target", "cell", "hidden"), FULL)
def test_full_fp32(target, cell, hidden, tmp_path):
    """On tensor cores, in parts that are made once and stay in registers."""
    args = "--target", target, "--cell", cell, "--hidden", str(hidden), "--dtype", "fp32"
    rows = static(tmp_path, *args, "--kernel", "forward", "reverse")
    assert len(rows) == 2
    check_full(rows)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
@pytest.mark.parametrize("target", ["80", "90", "120"])
def test_full_fp32_everywhere(target, cell, tmp_path):
    args = "--target", target, "--cell", cell, "--dtype", "fp32", "--hidden"
    rows = static(tmp_path, *args, "32", "64", "96", "128", "256", "512")
    assert len(rows) == 18
    check_full(rows)


@pytest.mark.parametrize(
    ("target", "cell", "hidden"),
    [("80", "lstm", "1280")]
    + [
        pytest.param(target, cell, hidden, marks=pytest.mark.slow)
        for target, cell, hidden in (
            ("80", "lstm", "1408"),
            ("80", "lstm", "1536"),
            ("90", "lstm", "1056"),
            ("90", "lstm", "1536"),
            ("90", "lstm", "1792"),
            ("90", "gru", "1792"),
            ("90", "gru", "2048"),
            ("120", "lstm", "1280"),
            ("120", "gru", "1792"),
        )
    ],
)
def test_registers_and_shared(target, cell, hidden, tmp_path):
    """Chunks of weights in registers, and the others read from shared memory, all of them."""
    args = "--target", target, "--cell", cell, "--hidden", hidden
    gates = CELLS[cell].kernels.gates
    for row in static(tmp_path, *args, "--kernel", "forward", "reverse"):
        limits = next(v for k, v in LIMITS.items() if str(k) == target)
        plan = make_plan(plan_request(cell, int(hidden), 2, 8, 1, "tf32"), limits)
        assert plan.weights == "registers and shared"
        kept = -(-int(hidden) // plan.block_k) - plan.chunks
        assert row["weights_shared"] == kept * gates * plan.block_h * plan.block_k * 2
        check(row)


@pytest.mark.slow
def test_whole_chip_and_beyond(tmp_path):
    """Part of the weights in shared memory, and all in L2: they build, and stay in bounds."""
    for target, hidden, regime in (("90", "2048", "cooperative"), ("80", "2048", "streamed")):
        args = "--target", target, "--cell", "lstm", "--hidden", hidden
        for row in static(tmp_path, *args, "--kernel", "forward", "reverse"):
            assert row["regime"] == regime
            check(row)


@pytest.mark.parametrize("cell", ["gru", "rnn_tanh"])
def test_budget(cell, tmp_path):
    """The largest size of the other cells; LSTM's is in the test above."""
    hidden = "256" if cell == "rnn_tanh" else "128"
    for row in static(tmp_path, "--target", "90", "--cell", cell, "--hidden", hidden):
        check(row)


def test_sizes_do_not_recompile():
    """No value of what varies from call to call is a part of the compiled code."""
    script = (
        "from fused_rnn.kernels.forward import forward_kernel as f\n"
        "from fused_rnn.kernels.backward import backward_kernel as b\n"
        "print([[p.name for p in k.params if p.do_not_specialize] for k in (f, b)])"
    )
    varies = {"T", "B", "N", "first_tile", "first_direction", "reverse", "zoneout", "scale"}
    forward, backward = ast.literal_eval(python("-c", script))
    assert set(forward) == varies
    assert set(backward) == varies | {"zero", "clip"}


ORDERS = """
from bench import static, static_compile
from fused_rnn.kernels import group
from fused_rnn.kernels.chips import LIMITS
for gpu in (80, 90):
    limits = LIMITS[gpu]
    print(group.needs_block_barriers(static_compile.gpu_target(limits)))
    for H, kernel in ((256, "reverse"), (512, "forward"), (2048, "reverse")):
        plan = static.plan_for("lstm", H, "bf16", limits)
        ptx = static_compile.compile_sweep(kernel, "lstm", H, "bf16", limits, plan).asm["ptx"]
        print(group.memory_order(ptx))
"""


def test_block_barriers():
    """Of the compiler or, before Triton 3.9, ours: in every group's kernel they are there.

    Between the last store and each release, and between each acquire and the next load.
    """
    for line in python("-c", ORDERS).split():
        if line in ("True", "False"):
            assert line == str(OLD)
        else:
            assert {"r", "a"} <= set(line)
            assert all("s" not in part.split("b")[-1] for part in line.split("r")[:-1]), line
            assert all("l" not in part.split("b")[0] for part in line.split("a")[1:]), line


OPTIONS_SPILL = 32  # bytes: no plan reckons with what options need


def check_options(rows):
    """With options, too, nothing of the weights is read again; without them, all is as ever."""
    for row in rows:
        if row["options"] == "none":
            check(row)
        else:
            assert row["weights_shared"] == row["weights_global"] == 0, row
            assert row["spill"] <= OPTIONS_SPILL, row


def test_options(tmp_path):
    args = "--target", "90", "--cell", "lstm", "--hidden", "128", "--kernel", "forward", "reverse"
    check_options(static(tmp_path, *args, "--options", "all"))


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_each_option(cell, tmp_path):
    """In one program and in a group."""
    args = "--target", "80", "--cell", cell, "--hidden", "96", "512"
    check_options(static(tmp_path, *args, "--kernel", "forward", "reverse", "--options"))


NAMES, TARGETS = list(CELLS), [str(t) for t in LIMITS]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "cell"), [(t, NAMES[(i + j) % 4]) for i, t in enumerate(TARGETS) for j in (0, 2)]
)
def test_turns(target, cell, tmp_path):
    """Cells, targets, dtypes and sizes, no powers of two among them, take turns."""
    turn = list(CELLS).index(cell) + [str(t) for t in LIMITS].index(target)
    hidden = ("16", "33", "64", "96", "128")[turn % 5]
    dtype = ("bf16", "fp16", "tf32", "fp32")[turn % 4]
    if "32" in dtype and int(hidden) > 64:
        hidden = "40"
    args = "--target", target, "--cell", cell, "--dtype", dtype, "--hidden", hidden
    rows = static(tmp_path, *args, "--kernel", "forward", "reverse")
    assert len(rows) == 2
    for row in rows:
        check(row)


ROUNDED = """
from bench.static_compile import compile_sweep
from fused_rnn.cells.builtin import CELLS
from fused_rnn.kernels.chips import LIMITS
from fused_rnn.kernels.plan import PlanRequest
from fused_rnn.kernels.planner import make_plan
import torch
KINDS = {"tf32": torch.float32, "bf16": torch.bfloat16}
for cell, H, target, dtype in (
    ("lstm", 40, 90, "tf32"),
    ("gru", 256, 80, "tf32"),
    ("rnn_tanh", 40, 90, "bf16"),
    ("rnn_tanh", 40, "gfx942", "tf32"),
):
    limits = LIMITS[target]
    plan = make_plan(PlanRequest(CELLS[cell].kernels, H, KINDS[dtype], 8, 1), limits)
    for kernel in ("forward", "reverse"):
        asm = compile_sweep(kernel, cell, H, dtype, limits, plan).asm
        text = asm["ptx"] if "ptx" in asm else asm["amdgcn"]
        print(target, dtype, kernel, "cvt.rna.tf32.f32" in text)
"""


def test_operands_are_rounded_to_tf32():
    """Tensor cores of NVIDIA's would cut them off."""
    lines = python("-c", ROUNDED).splitlines()
    assert len(lines) == 8
    for line in lines:
        target, dtype, _, rounds = line.split()
        assert (rounds == "True") is (dtype == "tf32" and target != "gfx942"), line
