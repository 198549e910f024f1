"""The kernels with cells of up to four states, parameters of each unit, and heads.

The oracle is a plain loop in fp64, differentiated by autograd.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from concurrent_interpreter import concurrent_grid
from helpers import assert_close
from kernel_cells import OWN, dense, loop
from torch import Tensor

from fused_rnn.cells.builtin import CELLS
from fused_rnn.engines.triton.engine import TritonEngine
from fused_rnn.engines.triton.products import plan_request
from fused_rnn.kernels.chips import LIMITS
from fused_rnn.kernels.planner import make_plan
from fused_rnn.spec.batch import BatchLayout
from fused_rnn.spec.layer import (
    NO_TENSORS,
    LayerInputs,
    LayerSpec,
    Needs,
    Options,
    OptionTensors,
    OutputGrads,
    WeightNeeds,
    Weights,
)

ROOT = Path(__file__).parent.parent
I = 3


@dataclass
class Case:
    """A layer and what is asked of it."""

    packed: bool = False
    options: bool = False
    zoneout: float | None = None
    recompute: bool = False
    directions: int = 2


# Of `ratio`, where a tile has no unit: the interpreter tells, and no result shows it.
no_number = [
    pytest.mark.filterwarnings(f"ignore:{what}:RuntimeWarning")
    for what in ("invalid value", "divide by zero", "overflow")
]
NAMES = [pytest.param(name, marks=no_number if name == "ratio" else ()) for name in OWN]
CASES = {
    "plain": Case(),
    "packed": Case(packed=True),
    "options": Case(options=True),
    "expected": Case(options=True, zoneout=0.3),
    "recompute": Case(options=True, recompute=True),
    "recompute packed": Case(packed=True, recompute=True),
}


def built_in(name: str) -> tuple[Any, Any]:
    """The step of a cell of the package, and how the kernels run it."""
    cell: Any = CELLS[name]

    def step(gx: Tensor, gh: Tensor, states: list[Tensor], vectors: Any) -> list[Tensor]:
        return list(cell.one_step(gx, gh, states))

    return step, cell.kernels


def make(kernels: Any, case: Case, H: int, B: int, heads: int = 1) -> tuple[LayerSpec, LayerInputs]:
    """A layer with random tensors, in fp64 but exact in fp32."""
    T, K, D = 4, kernels.states - 1, case.directions
    layout = BatchLayout(T, B)
    if case.packed:
        layout = BatchLayout.packed(torch.tensor([B, B - 1, B - 1, 1]))

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape) * scale).double()

    def others(*shape: int) -> Tensor | None:
        """States beside h; the third one is to divide by."""
        parts = [random(*shape, H) for _ in range(K)]
        if K > 1:
            parts[1] = parts[1].abs() + 0.5
        return torch.cat(parts, -1) if K else None

    G = len(kernels.h_slots)
    weights = tuple(
        Weights(
            random(G * H, I),
            random(heads, G * H // heads, H // heads, scale=0.5).squeeze(0),
            random(G * H),
            random(G * H),
            None,
            random(kernels.parameters, H) if kernels.parameters else None,
        )
        for _ in range(D)
    )
    how, tensors = None, NO_TENSORS
    if case.options:
        zoned = case.zoneout is None
        how = Options(zoned=True, zoneout=case.zoneout or 0.0, clip=0.3, cells=K > 0)
        lengths = torch.randint(0, T + 1, (B,))
        lengths[0] = T
        tensors = OptionTensors(
            lengths,
            torch.rand(T * B) < 0.4,
            random(D, H),
            others(D),
            torch.rand(T * B, D * H) < 0.3 if zoned else None,
            torch.rand(T * B, D * K * H) < 0.3 if zoned and K else None,
            (torch.rand(D, B, H) < 0.6) / 0.6,
        )
    cell: Any = SimpleNamespace(kernels=kernels, name=kernels.name)
    spec = LayerSpec(cell, layout, D, H, recompute=case.recompute, options=how, heads=heads)
    inputs = LayerInputs(random(layout.N, I), random(D, B, H), others(D, B), weights, tensors)
    return spec, inputs


def compare(
    step: Any, spec: LayerSpec, inputs: LayerInputs, plan: Any, device: str = "cpu"
) -> None:
    """Outputs and all gradients of the engine in fp32 against the loop in fp64."""
    fixed = (inputs.options.lengths, inputs.options.reset, inputs.options.drop)
    wanted = [
        t for t in inputs.flatten()
        if t is not None and t.is_floating_point() and not any(t is f for f in fixed)
    ]  # fmt: skip
    for t in wanted:
        t.requires_grad_()
    expected = loop(step, spec, inputs)
    cells = spec.options is not None and spec.options.cells
    given = [o for o in expected if o is not None][: 4 if cells else 3]
    grads = [torch.randn(o.shape).double() for o in given]
    found = torch.autograd.grad(given, wanted, grads)
    exact = {id(t): g for t, g in zip(wanted, found, strict=True)}

    def to(t: Tensor) -> Tensor:
        return t.detach().to(device, torch.float32 if t.is_floating_point() else t.dtype)

    mine, engine = inputs.map(to), TritonEngine(plan, "ieee")
    outputs, saved = engine.forward(spec, mine, save=True)
    for name, a, b in zip(outputs._fields, outputs, expected, strict=True):
        if a is not None and b is not None:
            assert_close(a.cpu(), b.detach(), name, growth=4)
    shapes = engine.saved_specs(spec, mine)
    for t, described in zip(saved, shapes, strict=True):
        assert (None if t is None else (tuple(t.shape), t.dtype)) == described
    all_of = WeightNeeds(*[t is not None for t in mine.weights[0]])
    needs = Needs(True, True, True, (all_of,) * spec.directions, True, True)
    d = OutputGrads(*[to(g) for g in grads])
    result = engine.backward(spec, mine, outputs.out, saved, d, needs)
    names = ["x", "h0", "c0"]
    names += [f"{d} {n}" for d in range(spec.directions) for n in Weights._fields]
    names += OptionTensors._fields
    for name, t, g in zip(names, inputs.flatten(), result.flatten(), strict=True):
        if t is not None and id(t) in exact:
            assert g is not None, name
            assert_close(g.cpu(), exact[id(t)], f"gradient of {name}", growth=8)


def plan_of(spec: LayerSpec, **parts: Any) -> Any:
    """The plan of one program; or with these parts, that of a group."""
    request = plan_request(spec, torch.float32, "ieee")
    plan = make_plan(request, replace(LIMITS[80], groups=False, fast_tanh=False))
    if parts:
        plan = replace(plan, regime="cooperative", block_h=16, block_k=32, block_b=8, tiles=0)
        plan = replace(plan, programs=-(-request.H // 16), k_split=1, m_split=1)
        plan = replace(plan, **{"chunks": -(-request.H // 32)} | parts)
        assert plan.programs > 1
    return plan


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_own_cells(name: str, case: str, triton_device: str) -> None:
    step, kernels = OWN[name]
    spec, inputs = make(kernels, CASES[case], 7, 3)
    compare(step, spec, inputs, plan_of(spec), triton_device)


GROUPS: dict[str, dict[str, Any]] = {
    "registers": {"k_split": 1},
    "streamed": {"regime": "streamed", "chunks": 0},
    "launches": {"tiles": 1},
}


@pytest.mark.parametrize("case", ["plain", "options", "packed"])
@pytest.mark.parametrize("name", NAMES)
def test_own_cells_in_groups(name: str, case: str) -> None:
    step, kernels = OWN[name]
    how = list(GROUPS)[(list(OWN).index(name) + list(CASES).index(case)) % 3]
    B = 9 if how == "launches" else 3
    spec, inputs = make(kernels, replace(CASES[case], directions=1), 19, B)
    with concurrent_grid(seed=3, timeout=600):
        compare(step, spec, inputs, plan_of(spec, **GROUPS[how]))


HEADS = [
    ("lstm", 2, "plain"), ("lstm", 3, "packed"), ("lstm", 2, "options"), ("lstm", 3, "recompute"),
    ("gru", 3, "plain"), ("gru", 2, "packed"), ("gru", 3, "expected"), ("gru", 2, "recompute"),
    ("rnn_tanh", 2, "options"), ("slstm", 2, "options"), ("slstm", 2, "recompute"),
    ("peephole", 3, "options"), ("peephole", 2, "recompute"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "heads", "case"), HEADS)
def test_heads(name: str, heads: int, case: str, triton_device: str) -> None:
    """Against recurrent weights that are zero outside of the heads."""
    step, kernels = OWN[name] if name in OWN else built_in(name)
    spec, inputs = make(kernels, CASES[case], 4 * heads, 3, heads)
    compare(step, spec, inputs, plan_of(spec), triton_device)


@pytest.mark.parametrize(("name", "case"), [("lstm", "plain"), ("slstm", "options")])
def test_heads_in_groups(name: str, case: str) -> None:
    step, kernels = OWN[name] if name in OWN else built_in(name)
    spec, inputs = make(kernels, replace(CASES[case], directions=1), 38, 3, 2)
    with concurrent_grid(seed=3, timeout=600):
        compare(step, spec, inputs, plan_of(spec, k_split=1))


def test_many_heads(triton_device: str) -> None:
    """More than there are bits in the number that says which directions run in reverse."""
    step, kernels = built_in("rnn_tanh")
    spec, inputs = make(kernels, CASES["plain"], 33, 1, 33)
    compare(step, spec, inputs, plan_of(spec), triton_device)


def test_one_weight_for_all_heads_is_the_dense_layer() -> None:
    w = torch.randn(2, 6, 3)
    assert torch.equal(dense(w)[:3, :3], w[0, :3])
    assert torch.equal(dense(w)[9:, 3:], w[1, 3:])
    assert not dense(w)[:3, 3:].any()


def test_the_plan_names_the_heads() -> None:
    _, kernels = built_in("lstm")
    spec, _ = make(kernels, CASES["plain"], 768, 2, 12)
    request = plan_request(spec, torch.bfloat16, "tf32")
    assert (request.H, request.D) == (64, 24)
    assert make_plan(request, LIMITS[90]).reason.startswith("12 heads of 64; persistent: 64 units")


@pytest.mark.parametrize("hidden", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_compiled_kernels(hidden: int, tmp_path: Path) -> None:
    """Cells with more to keep than an LSTM spill nothing: the planner counts it."""
    pytest.importorskip("triton")
    out = tmp_path / "rows.json"
    code = "import sys; sys.path.insert(0, 'tests'); import kernel_cells; kernel_cells.show(); "
    command = [sys.executable, "-c", code + "from bench.static import main; main()"]
    command += ["--cell", "slstm", "peephole", "--hidden", str(hidden), "--target", "90"]
    command += ["--kernel", "reverse", "--json", str(out)]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for row in rows:
        assert row["spill"] == row["weights_global"] == row["weights_shared"] == 0, row
    assert {row["cell"] for row in rows} == {"slstm", "peephole"}
