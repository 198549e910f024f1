"""``python -m fused_rnn.check``: faults of the rows and of their processes, what it remembers."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from fused_rnn.engines import measured
from fused_rnn.engines.triton import devices
from fused_rnn.tools.check import child, children, report
from fused_rnn.tools.check.command import main, to_remember
from fused_rnn.tools.check.rows import CELLS, Row

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


# ---- faults -------------------------------------------------------------------------------------


def test_wrong_and_unrepeatable_rows(capsys: pytest.CaptureFixture[str]) -> None:
    status, found = faulty(capsys, FusedRNN="wrong", FusedGRU="unrepeatable")
    assert status == 1
    assert not found["green"]
    wrong, differs, right = found["rows"]
    assert wrong["state"] == differs["state"] == "red"
    assert wrong["why"].startswith("WRONG: ")
    assert wrong["error"] > wrong["allowed"]
    assert differs["why"].startswith("NOT REPEATABLE: ")
    assert (wrong["identical"], differs["identical"]) == (True, False)
    assert all(row[speed] is None for row in (wrong, differs) for speed in SPEEDS)
    assert right["state"] == "green"
    assert all(right[speed] > 0 for speed in SPEEDS)
    # What ran is what explain says, not what was wanted.
    assert (wrong["wanted"], wrong["ran"]) == ("persistent", "native")
    assert wrong["reason"].startswith("layer 0: native: torch.nn's own kernels")

    text = io.StringIO()
    report.show(found, Console(file=text, width=100))
    lines = text.getvalue().splitlines()
    (line,) = (line for line in lines if line.startswith(" rnn_tanh  fp32"))
    assert "native, not" in line
    assert "rnn_tanh fp32 persistent H=4: not checked, native ran:" in lines
    assert line.rstrip().endswith("WRONG")
    assert sum(line.startswith(" lstm") for line in lines) == 2  # its numbers, its speed
    assert sum(line.startswith(" gru") for line in lines) == 1


@pytest.mark.slow
def test_hangs_and_crashes_and_exceptions(capsys: pytest.CaptureFixture[str]) -> None:
    faults = {"FusedRNN": "crash", "FusedGRU": "hang", "FusedLSTM": "refused"}
    status, found = faulty(capsys, "--limit", "8", **faults)
    assert status == 1
    crash, hang, refused = found["rows"]
    assert crash["why"] == "CRASHED with signal SIGKILL: last words"
    assert hang["why"] == "HUNG after 8 s"
    assert refused["why"] == "FAILED: RuntimeError: refused"
    for row in found["rows"]:
        assert row["state"] == "red"
        assert row["ran"] == "native"  # known before it ran
        assert row["reason"].startswith("layer 0: native: ")
        assert all(row[speed] is None for speed in SPEEDS)


def test_not_a_number_is_red_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    status, found = faulty(capsys, FusedGRU="not a number")
    assert status == 1
    assert found["rows"][1]["error"] is None
    assert found["rows"][1]["why"].startswith("WRONG: ")


# The parent alone, with children that take no time to start.
SCRIPT = """
import json, os, sys, time
def tell(**event): print(json.dumps(event), flush=True)
task = json.loads(sys.argv[1])
tell(header={"threads": len(task["done"])})
names = ["one", "two", "three"]
tell(items=[{"kind": "row", "name": n, "state": "red", "why": ""} for n in names])
for name in names:
    if name in task["done"]: continue
    tell(begins=name)
    fault = task["faults"].get(name)
    if fault == "hang": time.sleep(1000)
    if fault == "crash": print("oh no", file=sys.stderr, flush=True); os.abort()
    if fault == "exit": sys.exit(3)
    tell(ends=name, state="green")
    if fault == "exit after": sys.exit(4)
"""


def parent(script: str = SCRIPT, limit: float = 3, **faults: str) -> dict[str, Any]:
    task = {"faults": faults}
    command = [sys.executable, "-c", script]
    _, items = children.run(task, dict(os.environ), limit, command=command)
    return {item["name"]: item.get("why") or item["state"] for item in items}


def test_children_take_up_with_what_is_left() -> None:
    assert parent() == {"one": "green", "two": "green", "three": "green"}
    assert parent(one="crash", three="exit") == {
        "one": "CRASHED with signal SIGABRT: oh no",
        "two": "green",
        "three": "CRASHED with exit status 3",
    }
    assert parent(two="hang") == {"one": "green", "two": "HUNG after 3 s", "three": "green"}
    assert parent(one="exit after") == {"one": "green", "two": "green", "three": "green"}


def test_children_that_do_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parent("import sys; sys.exit('no torch')") == {
        "start": "CRASHED with exit status 1: no torch"
    }
    never = SCRIPT.replace("names:", "names:\n    sys.exit('no more')")
    assert parent(never) == dict.fromkeys(
        ("one", "two", "three"), "CRASHED with exit status 1: no more"
    )
    monkeypatch.setattr(children, "START", 1.0)
    assert parent("import time; time.sleep(1000)", limit=1) == {"start": "HUNG after 1 s"}


def test_an_interrupt_ends_the_child(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "pid"
    script = "import os, signal, sys, time; open(sys.argv[1], 'w').write(str(os.getpid()));"
    script += "time.sleep(0.5); os.kill(os.getppid(), signal.SIGINT); time.sleep(1000)"
    # A shell that starts pytest in the background lets it ignore interrupts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main([], [sys.executable, "-c", script, str(file)]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "interrupted\n"
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text()), 0)


def test_a_start_that_fails_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([], [sys.executable, "-c", "import sys; sys.exit('no torch')"]) == 1
    assert "start: CRASHED with exit status 1: no torch" in capsys.readouterr().out


# ---- what is remembered -------------------------------------------------------------------------


def test_nothing_to_remember(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        main(["--remember"])
    assert stopped.value.code == 2
    assert "there is no GPU here, so there is nothing to remember" in capsys.readouterr().err


def test_only_what_is_green_is_remembered() -> None:
    rows = [
        {"name": "a", "state": "green", "ran": "cooperative"},
        {"name": "b", "state": "red", "ran": "cooperative"},
        {"name": "c", "state": "green", "ran": "eager"},
        {"name": "d", "state": "red", "ran": None},
    ]
    barrier = [{"state": "green", "us": us} for us in (0.5, 0.9, 0.6)]
    assert to_remember(rows, barrier) == {"rows": rows[:1], "hop_us": 0.6}
    assert to_remember(rows, [*barrier, {"state": "red", "us": None}])["hop_us"] is None
    assert to_remember(rows, [])["hop_us"] is None


@pytest.fixture
def cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """An H100 that is not there, and an empty memory."""
    monkeypatch.setenv("FUSED_RNN_CACHE", str(tmp_path))
    properties = SimpleNamespace(
        major=9,
        minor=0,
        multi_processor_count=132,
        shared_memory_per_block_optin=227 * 1024,
        shared_memory_per_multiprocessor=228 * 1024,
    )
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: properties)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "A GPU")
    stores = measured.plans, measured.constants
    for store in stores:
        store.forget()
    devices.device_limits.cache_clear()
    yield torch.device("cuda", 0)
    for store in stores:
        store.forget()
    devices.device_limits.cache_clear()


def test_the_barrier_is_remembered(cuda: torch.device, tmp_path: Path) -> None:
    assert devices.device_limits(cuda).hop_us == 0.855
    items, works = child._to_remember({"hop_us": 1.25, "rows": []}, cuda)
    assert [item["name"] for item in items] == ["barrier"]
    assert works[0](print) == {"state": "green", "plan": "1.250 us for a barrier"}
    assert devices.device_limits(cuda).hop_us == 1.25
    assert list(json.loads((tmp_path / "constants.json").read_text()).values()) == [1.25]


@pytest.mark.parametrize("text", ["x", -1, 0, [1], None, float("nan"), float("inf")])
def test_a_strange_barrier_counts_for_nothing(
    cuda: torch.device, tmp_path: Path, text: Any
) -> None:
    (tmp_path / "constants.json").write_text(json.dumps({devices.hop_key(cuda): text}))
    assert devices.device_limits(cuda).hop_us == 0.855


def test_plans_are_remembered(cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def tune(layer: Any, x: torch.Tensor) -> tuple[str]:
        asked.append((type(layer).__name__, layer.hidden_size, x.shape, x.dtype))
        return ("a plan",)

    monkeypatch.setattr("fused_rnn.tools.tune.tune", tune)
    row = Row("gru", "bf16", "cooperative", T=3, B=2, I=4, H=8, timed_steps=0)
    known = {**vars(row), **child.UNKNOWN, "name": row.name, "kind": "row"}
    items, works = child._to_remember({"hop_us": None, "rows": [known]}, CPU)
    assert [item["name"] for item in items] == [row.name]
    assert works[0](print) == {"state": "green", "plan": "a plan"}
    assert asked == [("FusedGRU", 8, (3, 2, 4), torch.bfloat16)]


# ---- the command --------------------------------------------------------------------------------


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """On the CPU, whatever is here; from another folder, as users run it."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    full = [sys.executable, "-m", "fused_rnn.check", *arguments]
    environment = os.environ | hidden
    environment.pop("COLUMNS", None)
    return subprocess.run(full, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("limit", ["0", "-1", "nan", "inf", "1e300"])
def test_a_limit_that_is_none(limit: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--limit", limit])
    assert end.value.code == 2
    assert "--limit: seconds from 0 to 1000000, not" in capsys.readouterr().err


def test_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """It breaks lines; the table cuts nothing off."""
    monkeypatch.setenv("COLUMNS", "30")
    assert report.console().width == report.WIDTH
    monkeypatch.setenv("COLUMNS", "300")
    assert report.console().width == 300


@pytest.mark.slow
def test_quick_json() -> None:
    done = command("--quick", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert set(found) == {"header", "rows", "barrier", "remembered", "green"}
    names = "gpu driver kernels hop_us fused_rnn torch cuda cudnn rocm triton cpu threads os python"
    assert set(found["header"]) == set(names.split())
    assert found["green"]
    keys = {"kind", "name", *Row.__dataclass_fields__, *child.UNKNOWN}
    for row in found["rows"]:
        assert set(row) == keys
        assert row["ran"] == row["wanted"], row
        timed = row["timed_steps"] > 0
        assert all((row[speed] is not None) is timed for speed in SPEEDS)
    assert {row["ran"] for row in found["rows"]} >= {"sweeps", "native"}


@pytest.mark.slow
def test_the_table() -> None:
    done = command()
    assert (done.returncode, done.stderr) == (0, "")
    text = done.stdout
    assert max(map(len, text.splitlines())) <= report.WIDTH
    assert text.rstrip().endswith("All green.")
    shown = {tuple(line.split()[:3]) for line in text.splitlines()}
    for cell in CELLS:
        types = ("fp64", "fp32", "fp16", "bf16")
        expected = [(dtype, engine) for dtype in types for engine in ("sweeps", "native")]
        expected += [("fp32", "eager"), ("fp32", "persistent"), ("fp16", "persistent")]
        assert {(cell, *what) for what in expected} <= shown
