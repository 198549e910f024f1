"""Measured plans: which are timed, what is remembered, for what it holds."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import plan_request
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_rnn
from fused_rnn.cells.builtin import GRU
from fused_rnn.engines import measured
from fused_rnn.engines.triton import plans
from fused_rnn.kernels.chips import LIMITS
from fused_rnn.kernels.plan import DoesNotFit, Plan, PlanRequest

CUDA = torch.device("cuda")
REQUEST = plan_request("lstm", 512, torch.bfloat16, 16)
GUESSES = plans.planned(REQUEST, LIMITS[90])


def second_is_best(plan: Plan, request: PlanRequest, device: torch.device) -> float:
    return 1.0 if plan == GUESSES[1] else 2.0


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where plans are remembered; a GPU is pretended."""
    monkeypatch.setenv("FUSED_RNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FUSED_RNN_TUNE", raising=False)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "A GPU")
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(measured, "plans", measured.Store("plans.json"))
    monkeypatch.setattr(plans, "_chosen", {})
    return tmp_path / "cache"


def test_the_winner_is_remembered(cache: Path) -> None:
    assert plans.choose_plan(REQUEST, LIMITS[90], CUDA) == GUESSES[0]
    assert plans.measure(REQUEST, LIMITS[90], CUDA, second_is_best) == GUESSES[1]
    assert plans.choose_plan(REQUEST, LIMITS[90], CUDA) == GUESSES[1]
    (key,) = json.loads((cache / "plans.json").read_text())
    assert key.startswith("lstm H=512 bfloat16 tf32 D=1 B<=16 A-GPU triton-")


def test_the_best_guesses_are_timed() -> None:
    timed: list[Plan] = []

    def timer(plan: Plan, request: PlanRequest, device: torch.device) -> float:
        timed.append(plan)
        return 0.0

    plans.measure(REQUEST, LIMITS[90], CUDA, timer)
    assert timed == list(GUESSES[: plans.CANDIDATES])


def test_a_plan_that_fails_is_out() -> None:
    def timer(plan: Plan, request: PlanRequest, device: torch.device) -> float:
        if plan == GUESSES[0]:
            raise RuntimeError("a sweep failed, planned as the first")
        return second_is_best(plan, request, device)

    with pytest.warns(UserWarning, match="could not be timed: a sweep failed, planned as the fir"):
        assert plans.measure(REQUEST, LIMITS[90], CUDA, timer) == GUESSES[1]


def test_all_plans_fail(cache: Path) -> None:
    def timer(plan: Plan, request: PlanRequest, device: torch.device) -> float:
        raise RuntimeError("no luck")

    with pytest.raises(RuntimeError, match="no plan could be timed: no luck; no luck"):
        plans.measure(REQUEST, LIMITS[90], CUDA, timer)
    assert not cache.exists()


def test_another_process_is_heard(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it writes counts a second later, and not before: a look takes longer than a call."""
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    assert plans.choose_plan(REQUEST, LIMITS[90], CUDA) == GUESSES[0]
    cache.mkdir(parents=True)
    second = {plans.key(REQUEST, CUDA): plans._marks(GUESSES[1])}
    (cache / "plans.json").write_text(json.dumps(second))
    assert plans.choose_plan(REQUEST, LIMITS[90], CUDA) == GUESSES[0]
    now += 2 * measured.SECONDS
    assert plans.choose_plan(REQUEST, LIMITS[90], CUDA) == GUESSES[1]


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"null", b"\xff", None])
def test_a_broken_file_counts_for_nothing(cache: Path, text: bytes | None) -> None:
    """With a warning, and not in every call; what is remembered later stands in a good file."""
    cache.mkdir()
    if text is None:
        (cache / "plans.json").mkdir()
    else:
        (cache / "plans.json").write_bytes(text)
    with pytest.warns(UserWarning, match=r"plans\.json, what was measured on this GPU, cannot be "):
        assert plans.choose_plan(REQUEST, LIMITS[90], CUDA) == GUESSES[0]
    measured.plans.forget()
    assert plans.choose_plan(REQUEST, LIMITS[90], CUDA) == GUESSES[0]
    if text is not None:
        assert plans.measure(REQUEST, LIMITS[90], CUDA, second_is_best) == GUESSES[1]
        assert json.loads((cache / "plans.json").read_text()).keys() == {plans.key(REQUEST, CUDA)}


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user has no name: nothing is remembered, and layers run."""

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FUSED_RNN_CACHE")
    monkeypatch.setattr(Path, "home", home)
    assert plans.choose_plan(REQUEST, LIMITS[90], CUDA) == GUESSES[0]
    with pytest.raises(OSError, match="FUSED_RNN_CACHE can name a folder"):
        plans.measure(REQUEST, LIMITS[90], CUDA, second_is_best)
    assert plans.choose_plan(REQUEST, LIMITS[90], CUDA) == GUESSES[1]


def test_a_folder_that_cannot_be_written(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks for a measurement gets the error; a call of a layer goes on with what it found."""
    cache.write_text("a file in the folder's place")
    other = REQUEST._replace(H=256)
    with pytest.warns(UserWarning, match="cannot be read"):
        assert plans.choose_plan(other, LIMITS[90], CUDA) == plans.planned(other, LIMITS[90])[0]
    with pytest.raises(FileExistsError):
        plans.measure(REQUEST, LIMITS[90], CUDA, second_is_best)
    assert plans.choose_plan(REQUEST, LIMITS[90], CUDA) == GUESSES[1]
    monkeypatch.setattr(plans, "_chosen", {})
    monkeypatch.setattr(plans, "time_sweeps", lambda plan, *_: float(plan.block_b))
    monkeypatch.setenv("FUSED_RNN_TUNE", "1")
    with pytest.warns(UserWarning, match="A plan was timed, but cannot be remembered"):
        plans.choose_plan(other, LIMITS[90], CUDA)
    measured.plans.forget()
    plans.choose_plan(other, LIMITS[90], CUDA)  # warns no second time: pytest makes it an error


def test_many_writers(cache: Path) -> None:
    """Threads lose nothing of each other's, and leave no files behind."""
    store = measured.Store("plans.json")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: store.remember(str(n), n), range(40)))
    assert json.loads((cache / "plans.json").read_text()) == {str(n): n for n in range(40)}
    assert [path.name for path in cache.iterdir()] == ["plans.json"]


@pytest.mark.parametrize(
    ("change", "known"),
    [
        ({"B": 9}, True),  # a class of batch sizes is shared
        ({"B": 17}, False),
        ({"cell": GRU.kernels}, False),
        ({"H": 511}, False),
        ({"dtype": torch.float16}, False),
        ({"D": 2}, False),
    ],
)
def test_what_it_holds_for(change: dict[str, Any], known: bool) -> None:
    plans.measure(REQUEST, LIMITS[90], CUDA, second_is_best)
    other = REQUEST._replace(**change)
    guesses = plans.planned(other, LIMITS[90])
    chosen = plans.choose_plan(other, LIMITS[90], CUDA)
    assert (chosen != guesses[0]) is known


def test_not_on_another_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    plans.measure(REQUEST, LIMITS[90], CUDA, second_is_best)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "Another GPU")
    assert plans.choose_plan(REQUEST, LIMITS[90], CUDA) == GUESSES[0]


def test_the_environment_asks_for_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Plan] = []

    def timer(plan: Plan, request: PlanRequest, device: torch.device) -> float:
        calls.append(plan)
        return second_is_best(plan, request, device)

    monkeypatch.setattr(plans, "time_sweeps", timer)
    monkeypatch.setenv("FUSED_RNN_TUNE", "1")
    assert plans.choose_plan(REQUEST, LIMITS[90], CUDA) == GUESSES[1]
    count = len(calls)
    assert plans.choose_plan(REQUEST, LIMITS[90], CUDA) == GUESSES[1]
    assert len(calls) == count


def test_nothing_is_timed_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "time_sweeps", None)  # to call it would raise
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
    monkeypatch.setenv("FUSED_RNN_TUNE", "1")
    assert plans.choose_plan(REQUEST, LIMITS[90], CUDA) == GUESSES[0]


def test_nothing_is_timed_while_a_tracer_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "time_sweeps", None)  # to call it would raise
    monkeypatch.setenv("FUSED_RNN_TUNE", "1")
    with FakeTensorMode():
        assert plans.choose_plan(REQUEST, LIMITS[90], CUDA) == GUESSES[0]


def test_no_plan() -> None:
    with pytest.raises(DoesNotFit, match="a group of programs cannot run here"):
        plans.choose_plan(REQUEST, LIMITS["gfx942"], CUDA)


def test_refuses() -> None:
    x = torch.zeros(4, 2, 3)
    with pytest.raises(TypeError, match="a fused layer is needed, got LSTM"):
        fused_rnn.tune(torch.nn.LSTM(3, 5), x)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="there is nothing to tune"):
        fused_rnn.tune(fused_rnn.FusedLSTM(3, 5), x)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA or ROCm device")
    layer = fused_rnn.FusedLSTM(64, 512, 2, dtype=torch.bfloat16, device="cuda")
    x = torch.zeros(4, 16, 64, dtype=torch.bfloat16, device="cuda")
    plans = fused_rnn.tune(layer, x)
    assert len(plans) == 2
    assert str(plans[0]) in str(fused_rnn.explain(layer, x))
