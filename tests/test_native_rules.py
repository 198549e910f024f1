"""When torch.nn's own kernels run: the rules, what was timed on the GPU at hand, and the choice."""

import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import (
    packer,
    plan_request,
    sequences,
)

import fused_rnn
from fused_rnn.cells.builtin import CELLS
from fused_rnn.engines import contest, dispatch, measured, native, native_rules
from fused_rnn.kernels.chips import LIMITS
from fused_rnn.kernels.planner import make_plan
from fused_rnn.spec.batch import BatchLayout
from fused_rnn.spec.layer import LayerSpec, Options
from fused_rnn.tools import tune

# ---- when it is chosen --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "dtype", "T", "B", "H", "options", "native_train"),
    [
        ("gru", torch.float32, 4, 8, 64, {}, True),
        ("gru", torch.float32, 64, 8, 64, {}, False),
        ("rnn_tanh", torch.float32, 16, 8, 64, {}, True),
        ("lstm", torch.float32, 64, 8, 64, {}, True),
        ("lstm", torch.float32, 64, 8, 64, {"ragged": True}, False),
        ("lstm", torch.float32, 64, 8, 64, {"projected": True}, False),
        ("lstm", torch.float64, 64, 8, 64, {}, False),
        ("gru", torch.float32, None, 8, 64, {}, False),
        ("lstm", torch.float32, None, 8, 64, {}, True),
    ],
)
def test_the_rule_of_a_cpu(
    cell: str, dtype: torch.dtype, T: int, B: int, H: int, options: Any, native_train: bool
) -> None:
    how = {"ragged": False, "projected": False} | options
    case = CELLS[cell], dtype, T, B, H
    assert (native_rules.suits(*case, train=True, **how) is not None) is native_train
    assert native_rules.suits(*case, train=False, **how) is not None


@pytest.mark.parametrize("instructions", [False, True])
def test_16_bits_go_by_what_the_cpu_can(
    instructions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_rules, "_multiplies", lambda dtype: instructions)
    how = {"ragged": False, "projected": False}

    def suits(T: int, B: int, H: int, train: bool) -> bool:
        found = native_rules.suits(CELLS["gru"], torch.bfloat16, T, B, H, train=train, **how)
        return found is not None

    assert suits(64, 32, 128, train=False) is instructions
    assert suits(64, 32, 128, train=True) is instructions  # 4096 units
    assert not suits(64, 8, 128, train=True)
    assert suits(4, 4, 16, train=True)
    assert suits(4, 4, 16, train=False)


def test_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    how = {"ragged": False, "projected": False, "train": True}
    monkeypatch.setattr(torch._C, "_get_mkldnn_enabled", lambda: False)
    assert native_rules.suits(CELLS["lstm"], torch.float32, 64, 8, 64, **how) is None


RESULTS = Path(__file__).parent.parent / "bench" / "results" / "nvidia-h200-grid.jsonl"
# Rows in which the slower one is taken by more than a tenth, and why.
KNOWN = {
    # The plan has changed since: it kept weights in shared memory, or took 8 sequences a launch.
    ("fp16", 256, 32, 1024, "forward"),
    ("bf16", 256, 32, 2048, "forward"),
    ("bf16", 256, 32, 2048, "train"),
    # A batch of 8 alone: one row is no rule.
    ("fp16", 256, 8, 512, "train"),
    # The host of these rows was fast. On one 1.5 times as slow, cuDNN was up to a third faster.
    ("fp16", 256, 1, 128, "forward"),
    ("fp16", 256, 8, 128, "forward"),
    ("fp16", 256, 32, 64, "forward"),
    ("fp16", 256, 32, 128, "forward"),
    ("fp16", 256, 128, 128, "forward"),
    ("fp16", 256, 512, 128, "forward"),
    ("tf32", 256, 32, 128, "forward"),
}


def measured_rows() -> Iterator[tuple[dict[str, Any], float, float]]:
    """A row, torch.nn's milliseconds and ours."""
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    for theirs, ours in zip(rows[::2], rows[1::2], strict=True):
        assert (theirs["provider"], ours["provider"]) == ("torch.nn", "fused_rnn")
        yield theirs, theirs["ms"], ours["ms"]


def test_the_rule_of_a_gpu_takes_what_was_measured_faster() -> None:
    dtypes = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16}
    lost = set()
    for row, theirs, ours in measured_rows():
        precision: Any = "ieee" if row["dtype"] == "fp32" else "tf32"
        dtype = dtypes.get(row["dtype"], torch.bfloat16)
        request = plan_request(row["cell"], row["H"], dtype, row["B"], 1, precision)
        plan = make_plan(request, LIMITS[90])
        layout, train = BatchLayout(row["T"], row["B"]), row["mode"] == "train"
        takes_theirs = native_rules.suits_gpu(request, plan, layout, train) is not None
        taken, other = (theirs, ours) if takes_theirs else (ours, theirs)
        if taken > 1.1 * other:
            lost.add((row["dtype"], row["T"], row["B"], row["H"], row["mode"]))
    assert lost == KNOWN


def test_no_rule_where_nothing_was_measured() -> None:
    plan = make_plan(plan_request("lstm", 64, 2, 32, 1), LIMITS[90])
    request = plan_request("lstm", 64, torch.float16, 32, 1, "tf32")
    assert native_rules.suits_gpu(request, plan, BatchLayout(16, 32), True)
    assert not native_rules.suits_gpu(request, plan, BatchLayout(16, 32, (32,) * 15 + (1,)), True)
    assert not native_rules.suits_gpu(request._replace(D=2), plan, BatchLayout(16, 32), True)
    assert not native_rules.suits_gpu(
        request._replace(cell=CELLS["gru"].kernels), plan, BatchLayout(16, 32), True
    )


def test_small_cells_of_one_state_on_a_gpu() -> None:
    """Timed were a GRU of 64 units in TF32, and an RNN of 128 in fp16: cuDNN was the faster one."""

    def takes_theirs(
        cell: str, H: int, dtype: torch.dtype, train: bool, precision: Any = "tf32"
    ) -> bool:
        request = plan_request(cell, H, dtype, 32, 1, precision)
        plan = make_plan(request, LIMITS[90])
        return native_rules.suits_gpu(request, plan, BatchLayout(512, 32), train) is not None

    for train in (False, True):
        assert takes_theirs("gru", 64, torch.float32, train)
        assert not takes_theirs("gru", 65, torch.float32, train)
        assert not takes_theirs("gru", 64, torch.float16, train)
        assert takes_theirs("rnn_tanh", 128, torch.float16, train) == train
        assert not takes_theirs("rnn_relu", 128, torch.float32, train)
        for cell in CELLS:  # not timed yet
            assert takes_theirs(cell, 128, torch.float32, train, "ieee")
            assert not takes_theirs(cell, 129, torch.float32, train, "ieee")


# ---- timed on the GPU ---------------------------------------------------------------------------

CUDA = torch.device("cuda")


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where winners are remembered; a GPU is pretended."""
    monkeypatch.setenv("FUSED_RNN_CACHE", str(tmp_path))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(measured, "engines", measured.Store("engines.json"))
    monkeypatch.setattr(contest, "_known", {})
    return tmp_path / "engines.json"


def test_the_faster_one_is_remembered(engines: Path) -> None:
    layer = fused_rnn.FusedLSTM(64, 128, dtype=torch.float16)
    x = torch.randn(100, 8, 64, dtype=torch.float16)
    request = plan_request("lstm", 128, torch.float16, 8, 1, "tf32")
    rows = BatchLayout(100, 8)
    seen: list[tuple[str, bool]] = []

    def timer(twin: Any, given: Any, train: bool) -> float:
        assert given is x
        assert twin.weight_hh_l0 is layer.weight_hh_l0
        seen.append((twin.backend, train))
        return 1.0 if (twin.backend == "native") is train else 2.0

    assert contest.winner(request, rows, True, CUDA) is None
    tune.hold(layer, x, request, rows, CUDA, timer)
    assert layer.backend == "auto"
    assert sorted(seen) == [(b, t) for b in ("native", "triton") for t in (False, True)]
    assert contest.winner(request, rows, True, CUDA) == "native"
    assert contest.winner(request, rows, False, CUDA) == "triton"
    assert contest.winner(request, BatchLayout(65, 7), True, CUDA) == "native"  # of the same class
    other = request._replace(B=9)
    for request_, rows_ in [(request, BatchLayout(64, 8)), (other, BatchLayout(100, 9))]:
        assert contest.winner(request_, rows_, True, CUDA) is None
    assert contest.winner(request, BatchLayout(100, 8, (8,) * 99 + (1,)), True, CUDA) is None
    assert contest.winner(request, rows, True, torch.device("cpu")) is None
    keys = json.loads(engines.read_text())
    assert "training T<=128 lstm H=128 float16" in " ".join(keys)


def test_a_layer_that_is_not_trained_is_timed_in_inference(engines: Path) -> None:
    layer = fused_rnn.FusedGRU(8, 16, dtype=torch.float16)
    request = plan_request("gru", 16, torch.float16, 4, 1, "tf32")
    x = torch.randn(10, 4, 8, dtype=torch.float16)
    for change in ({"recompute": True}, {}):
        for name, value in change.items():
            setattr(layer, name, value)
        if not change:
            layer.recompute = False
            layer.requires_grad_(False)
        tune.hold(layer, x, request, BatchLayout(10, 4), CUDA, lambda *_: 1.0)
        assert contest.winner(request, BatchLayout(10, 4), True, CUDA) is None
        assert contest.winner(request, BatchLayout(10, 4), False, CUDA) == "triton"


def test_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call without hooks, and the gradients of what trains; nothing is accumulated."""
    calls: list[float] = []

    def bench(call: Any, return_mode: str) -> float:
        call()
        calls.append(1.0)
        return 1.5

    monkeypatch.setattr("triton.testing.do_bench", bench)
    monkeypatch.setattr("torch.cuda.device", lambda device: nullcontext())
    layer = fused_rnn.FusedLSTM(3, 5)
    layer.bias_ih_l0.requires_grad_(False)
    layer.register_forward_hook(lambda *_: calls.append(-1.0))
    packed = packer(False)(sequences([2, 4], 3, torch.float32))
    for x in (torch.randn(4, 2, 3), packed):
        assert [tune.time_call(layer, x, train) for train in (False, True)] == [1.5, 1.5]
    assert calls == [1.0] * 4
    assert all(p.grad is None for p in layer.parameters())


@pytest.mark.parametrize("zoneout", [0.0, 0.5])
def test_tune_holds_the_contest(zoneout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch.nn's kernels can take part: they know no zoneout."""
    from fused_rnn.engines.triton.engine import TritonEngine

    layer = fused_rnn.FusedLSTM(3, 64, zoneout=zoneout)
    x = torch.randn(4, 2, 3)
    spec, inputs = tune.first_layer(layer, x)
    there = inputs._replace(x=SimpleNamespace(device=torch.device("cuda"), dtype=x.dtype))
    plan = make_plan(plan_request("lstm", 64, 4, 2, 1), LIMITS[90])
    held: list[Any] = []
    monkeypatch.setattr(tune, "first_layer", lambda *_: (spec, there))
    monkeypatch.setattr(tune, "make_engine", lambda *_: TritonEngine(plan, "tf32"))
    monkeypatch.setattr(tune, "device_limits", lambda device: LIMITS[90])
    monkeypatch.setattr(tune, "measure", lambda *_: plan)
    monkeypatch.setattr(tune, "hold", lambda *given: held.append(given))
    assert fused_rnn.tune(layer, x) == (plan,)
    assert len(held) == (zoneout == 0)


def test_the_choice_follows(engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was timed comes before the rule; a tracer, to whom T is a symbol, gets the kernels."""
    spec = LayerSpec(CELLS["lstm"], BatchLayout(2000, 8), 1, 128)
    plan = make_plan(plan_request("lstm", 128, 2, 8, 1), LIMITS[90])

    class Engine:
        precision = "tf32"

    Engine.plan = plan  # type: ignore[attr-defined]
    monkeypatch.setattr("fused_rnn.engines.triton.support.make_engine", lambda *args: Engine)
    monkeypatch.setattr(native, "cudnn", lambda: True)

    def backend(T: int, **how: Any) -> str:
        mine = replace(spec, layout=BatchLayout(T, 8), recompute=how.pop("recompute", False))
        how = {"record": True, "autograd_records": True} | how
        return dispatch.choose(mine, CUDA, torch.float16, "auto", **how).backend

    assert backend(2000) == "triton"
    assert backend(100) == "native"
    assert backend(100, autograd_records=False) == "triton"
    assert backend(100, recompute=True) == "triton"
    request = plan_request("lstm", 128, torch.float16, 8, 1, "tf32")
    for T, best in ((2000, "native"), (100, "triton")):
        measured.engines.remember(contest.key(request, BatchLayout(T, 8), True, CUDA), best)
    assert backend(2000) == "native"
    assert backend(100) == "triton"
    reason = dispatch.choose(spec, CUDA, torch.float16, "auto", autograd_records=True).reason
    assert "they were timed faster on this GPU" in reason


def test_where_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp64, projections, old GPUs: torch.nn's own, and the eager loop only for what it lacks."""
    monkeypatch.setattr(
        "fused_rnn.engines.triton.support.make_engine", lambda *args: "no such kernel"
    )
    spec = LayerSpec(CELLS["lstm"], BatchLayout(20, 8), 1, 128, projected=True)
    for kind in ("cuda", "mps", "xpu"):
        choice = dispatch.choose(spec, torch.device(kind), torch.float64, "auto")
        assert (choice.backend, choice.engine) == ("native", native)
        assert choice.reason == "torch.nn's own kernels: no fused kernel: no such kernel"
    clipped = replace(spec, options=Options(clip=1.0))
    choice = dispatch.choose(clipped, torch.device("cuda"), torch.float64, "auto")
    assert (choice.backend, choice.engine) == ("eager", None)
    assert choice.reason.endswith("not torch.nn's own: it has no options")
