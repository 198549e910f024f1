"""The benchmarks' own arithmetic, schema and skip reasons, and each script on tiny shapes."""

import dataclasses
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import plan_request
from torch import nn

from bench import (
    accuracy,
    learning,
    memory,
    optional,
    records,
    report,
    roofline,
    run,
    static_peers,
    timing,
)
from bench.cases import GPU_SETS, SETS, Case
from bench.providers import PROVIDERS, CompiledLoop, Fused, TorchNN
from fused_rnn.kernels.chips import LIMITS
from fused_rnn.kernels.planner import make_plan

CPU = torch.device("cpu")
LSTM = Case("lstm", "fp32", T=4, B=2, I=3, H=5)
TINY = ["--seconds", "0", "--threads", "1"]


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """A folder with the lines of the tiny set."""
    folder = tmp_path_factory.mktemp("lines")
    assert run.main(["--shapes", "tiny", "--device", "cpu", "--out", str(folder), *TINY]) == 0
    return folder


# Cases and providers


def test_sets_are_what_they_say():
    cases = {name: list(shapes.make()) for name, shapes in SETS.items()}
    assert {c.H * c.heads for c in cases["flashrnn-heads"]} == {768}
    assert {(c.T, c.B, c.H) for c in cases["flashrnn"]} == {(1024, 16, 768)}
    assert {c.dtype for c in cases["cudnn"]} == {"fp16"}
    assert not any(c.H % 128 for c in cases["cudnn"])
    assert {c.B for c in cases["batch"]} == {2**n for n in range(10)}
    uncovered = cases["uncovered"]
    assert min(c.H for c in uncovered) == 256
    assert max(c.H for c in uncovered) == 1536
    assert any(c.packed for c in uncovered)
    assert any(c.bidirectional for c in uncovered)


def test_packed_input_has_the_longest_length():
    x = dataclasses.replace(LSTM, packed=True, B=9).input(CPU)
    assert len(x.batch_sizes) == LSTM.T
    assert x.batch_sizes[0] == 9


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo looks at it
@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "gru", "lstm"])
def test_contenders_compute_the_same(cell):
    case = dataclasses.replace(LSTM, cell=cell)
    train, expected, saved = run.contender(TorchNN(), case, "train", CPU)
    assert saved > 0
    sizes = [g.shape for g in train()]
    for provider in (CompiledLoop("eager"), Fused(), Fused(recompute=True)):
        train, found, _ = run.contender(provider, case, "train", CPU)
        torch.testing.assert_close(found, expected)
        assert [g.shape for g in train()] == sizes


@pytest.mark.parametrize("mode", ["train", "sweep", "sweep_train"])
def test_a_regime_runs_by_its_plan(mode, triton_device):
    device, provider = torch.device(triton_device), Fused("persistent")
    case = dataclasses.replace(LSTM, cell="gru", heads=2 if mode == "sweep" else 1)
    assert provider.why_not(case, mode, device) is None
    assert provider.detail(case, device).startswith("persistent: 16 units")
    run.contender(provider, case, mode, device)[0]()


class Peer(ModuleType):
    """Stands in for a package: any function of it is this one."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None


def reasons(case, mode="train", device="cuda"):
    """Why each peer does not run a case."""
    names = [n for n in PROVIDERS if n.startswith(("FlashRNN", "haste", "TorchRL"))]
    return {n: PROVIDERS[n].why_not(case, mode, torch.device(device)) for n in names}


@pytest.fixture
def peers(monkeypatch):
    """All packages of peers seem to be installed."""
    for name in ("flashrnn", "haste_pytorch", "torchrl", "torchrl.modules"):
        monkeypatch.setitem(sys.modules, name, Peer(name))
    for name in ("tensordict_module", "tensordict_module._rnn_triton"):
        monkeypatch.setitem(sys.modules, f"torchrl.modules.{name}", Peer(name))
    monkeypatch.setattr("triton.language.make_block_ptr", None, raising=False)
    optional.why_not.cache_clear()
    yield
    optional.why_not.cache_clear()


def test_missing_packages_say_how_to_install_them():
    for name, reason in reasons(LSTM).items():
        if reason.startswith("not installed"):  # everywhere but on a machine for benchmarks
            assert "pip install" in reason or "build from" in reason, name
    assert optional.why_not("no_such_package", "pip install it").endswith("(pip install it)")


@pytest.mark.usefixtures("peers")
def test_peers_skip_what_they_cannot_do():
    assert set(reasons(LSTM, device="cpu").values()) == {"it needs a GPU"}
    found = reasons(dataclasses.replace(LSTM, cell="rnn_tanh"))
    assert set(found.values()) == {"it has no such cell"}
    found = reasons(dataclasses.replace(LSTM, dtype="bf16", H=64))
    assert found["haste"] == "it is not for bf16"
    assert [n for n, reason in found.items() if reason is None] == [
        "FlashRNN triton_fused",
        "FlashRNN cuda_fused",
        "TorchRL",
    ]
    odd = reasons(dataclasses.replace(LSTM, dtype="bf16", H=65))
    assert odd["FlashRNN triton_fused"] == "its kernels take powers of two"
    packed = reasons(dataclasses.replace(LSTM, dtype="tf32", H=64, packed=True))
    assert packed["TorchRL"] == "it has one direction and one length"
    assert "no time loop" in reasons(dataclasses.replace(LSTM, dtype="tf32"), "sweep")["TorchRL"]
    heads = reasons(dataclasses.replace(LSTM, dtype="bf16", H=64, heads=12), "sweep")
    assert heads["FlashRNN triton_fused"] is None


@pytest.mark.usefixtures("peers")
def test_flashrnn_needs_block_pointers(monkeypatch):
    monkeypatch.delattr("triton.language.make_block_ptr")
    case = dataclasses.replace(LSTM, dtype="bf16", H=64)
    assert "block pointers" in reasons(case)["FlashRNN triton_fused"]
    assert reasons(case)["FlashRNN cuda_fused"] is None


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_haste_gets_its_order_of_gates(cell, monkeypatch):
    class Layer(nn.Module):
        def __init__(self, I, H):
            super().__init__()
            n = {"gru": 3, "lstm": 4}[cell] * H
            self.kernel = nn.Parameter(torch.empty(I, n))
            self.recurrent_kernel = nn.Parameter(torch.empty(H, n))
            self.bias = nn.Parameter(torch.empty(n))
            if cell == "gru":
                self.recurrent_bias = nn.Parameter(torch.empty(n))

    monkeypatch.setattr(PROVIDERS["haste"], "function", lambda name: Layer)
    plain = dataclasses.replace(LSTM, cell=cell).layer(CPU)
    layer, _ = PROVIDERS["haste"].layer(plain, dataclasses.replace(LSTM, cell=cell))
    theirs, ours = {"gru": ("zrn", "rzn"), "lstm": ("igfo", "ifgo")}[cell]
    for i, gate in enumerate(theirs):
        expected = plain.weight_hh_l0.chunk(len(ours))[ours.index(gate)]
        assert torch.equal(layer.recurrent_kernel.chunk(len(ours), dim=1)[i].t(), expected)


def test_peers_of_the_static_report_are_skipped_with_a_reason():
    for peer in static_peers.JOBS:
        reason = static_peers.why_not(peer)
        assert reason is None or "install" in reason


# Timing


def test_interleaved_takes_turns_and_compares_within_them():
    calls = []
    runs = {name: (lambda name=name: calls.append(name)) for name in ("a", "b", "c")}
    fake = {"a": 4.0, "b": 2.0, "c": 8.0}

    def once(run):
        run()
        return [fake[calls[-1]]] * 5

    found = timing.interleaved(runs, 0, once, turns=3)
    assert calls[6:] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert found["b"] == timing.Times(2.0, 2.0, 2.0, ratio=2.0, samples=15)
    assert found["c"].ratio == 0.5
    assert timing.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)


def test_saved_bytes_are_counted_once():
    x = torch.randn(100, requires_grad=True)
    assert memory.saved_bytes(lambda: x * x, set()) == 400
    assert memory.saved_bytes(lambda: x * x, {x.untyped_storage().data_ptr()}) == 0


@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_kernels_save_what_is_counted_for_them(cell, recompute, triton_device):
    case = dataclasses.replace(LSTM, cell=cell, bidirectional=True)
    device = torch.device(triton_device)
    layer = PROVIDERS["fused_rnn"].layer(case.layer(device), case)[0]
    layer.backend, layer.recompute = "triton", recompute
    x = case.input(device)
    assert memory.saved_by(layer, lambda: layer(x)[0]) == memory.kernel_bytes(case, recompute)


# Roofline


def test_roofline_by_hand():
    H, B = 128, 8
    case = dataclasses.replace(LSTM, dtype="bf16", H=H, B=B)
    limits = LIMITS[90]
    plan = make_plan(plan_request("lstm", H, 2, B, 1), limits)
    found = roofline.bounds(case, "sweep", limits, plan)
    assert plan.programs == 1
    assert found.barrier == 0
    assert found.tensor == pytest.approx(2 * 4 * H * H * B / (4096 * 1755))
    assert found.l2 == pytest.approx(5 * 2 * H * B / (64 * 1755))
    assert found.us == max(found.tensor, found.l2)
    assert found.fraction(2 * found.us) == pytest.approx(0.5)


def test_roofline_of_a_group_has_a_barrier_for_each_sweep():
    case = dataclasses.replace(LSTM, dtype="bf16", H=1024, B=8)
    plan = make_plan(plan_request("lstm", 1024, 2, 8, 1), LIMITS[90])
    for with_plan in (plan, None):
        forward = roofline.bounds(case, "forward", LIMITS[90], with_plan)
        train = roofline.bounds(case, "train", LIMITS[90], with_plan)
        assert forward.limit == "barrier"
        assert train.barrier == 2 * forward.barrier == 2 * roofline.HOP_US[90]
    assert set(roofline.TENSOR) == set(LIMITS)


# Lines and reports


def test_lines_are_of_the_schema(measured):
    (path,) = measured.iterdir()
    assert path.name == "cpu-tiny.jsonl"
    lines = records.read([path])
    assert len(lines) == 3 * 2 * 2
    for line in lines:
        assert line.p20 <= line.ms <= line.p80
        assert line.difference < 1e-6
        assert line.machine.torch == torch.__version__
        assert line.timer == "time.perf_counter"
        assert line.limit is None
    values = json.loads(path.read_text().splitlines()[0])
    for change, message in (
        ({"speed": 1}, "speed"),
        ({"ms": "fast"}, "ms of a Line"),
        ({"machine": {"device": "cpu"}}, "Machine without device_name"),
    ):
        with pytest.raises(ValueError, match=message):
            records.parse(json.dumps(values | change))
    del values["ratio"]
    with pytest.raises(ValueError, match="without ratio"):
        records.parse(json.dumps(values))
    with pytest.raises(ValueError, match="not an object"):
        records.parse("3")


def test_kept_results_are_of_the_schema_and_name_a_commit():
    for line in records.read(report.files([report.RESULTS])):
        assert line.machine.commit


def test_report_prints_tables_and_what_is_missing(measured, tmp_path, capsys):
    assert report.main([str(measured), "--plots", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("geometric mean") == 3
    for name in GPU_SETS:
        assert (
            f"not measured yet; on a machine with a GPU: `python -m bench.run --shapes {name}"
            in (printed)
        )
    (picture,) = tmp_path.iterdir()
    assert picture.name == "speed-tiny-cpu.png"
    assert picture.stat().st_size > 1000


def test_report_of_a_gpu_has_every_provider_and_its_limit(measured):
    (theirs, ours) = [x for x in records.read(report.files([measured])) if x.cell == "gru"][:2]
    machine = dataclasses.replace(theirs.machine, device="cuda", device_name="Some GPU")
    lines = [
        run.bounded(
            dataclasses.replace(line, machine=machine, shapes="cudnn", ms=ms, ratio=ratio),
            roofline.Bounds(barrier=0.5, tensor=0.1, l2=0.2),
        )
        for line, ms, ratio in ((theirs, 0.004, 1.0), (ours, 0.008, 0.5))
    ]
    text = report.tables(lines)
    assert "| 1.00 (1.00) | 2.00 (0.50) | 25% of barrier |" in text  # a row in which we lose stays
    assert "Some GPU" in text
    assert "cudnn" not in report.missing(lines)
    assert "batch" in report.missing(lines)


def test_a_failing_contender_is_told_of(monkeypatch, capsys):
    def layer(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(PROVIDERS["fused_rnn"], "layer", layer)
    assert run.main(["--shapes", "2,1,3,4", "--cells", "gru", "--device", "cpu", *TINY]) == 1
    told = capsys.readouterr()
    assert "skipped: fused_rnn: FAILED, RuntimeError: broken (first for gru fp32 T=2" in told.err
    assert "torch.nn" in told.out


def test_bad_shapes_are_refused(capsys):
    with pytest.raises(SystemExit):
        run.main(["--shapes", "1,2,3"])
    assert "four positive integers" in capsys.readouterr().err


@pytest.mark.parametrize("script", [run, accuracy, learning, memory])
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "abacus", "meta"])
def test_a_device_that_is_not_there_is_refused(script, device, monkeypatch, capsys):
    def no_gpu(*_):  # as PyTorch without CUDA says
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(torch.cuda, "_lazy_init", no_gpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if torch.cuda.is_initialized() and device.startswith("cuda"):
        pytest.skip("the GPU of this process is in use already")
    with pytest.raises(SystemExit) as stop:
        script.main(["--device", device])
    assert stop.value.code == 2
    assert f"argument --device: '{device}' cannot be used" in capsys.readouterr().err


def test_run_takes_no_other_device_than_it_can_name(monkeypatch, capsys):
    """Lines of JSON say cuda or cpu, and are measured on what they say."""
    monkeypatch.setattr(run, "device", torch.device)
    with pytest.raises(SystemExit):
        run.main(["--device", "cuda:1"])
    assert "argument --device: cuda or cpu, not cuda:1" in capsys.readouterr().err


def test_list_names_sets_and_providers(capsys):
    assert run.main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*SETS, *PROVIDERS))


# The other scripts


def test_memory(capsys):
    argv = ["--hidden", "8", "--steps", "3", "--batch", "2", "--device", "cpu"]
    assert memory.main([*argv, "--cells", "gru", "--dtypes", "fp32"]) == 0
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith("| gru | fp32 | 8, 8 |")


def test_accuracy(capsys, tmp_path):
    picture = tmp_path / "accuracy.png"
    argv = ["--steps", "3", "5", "--hidden", "4", "--batch", "2", "--dtypes", "fp32", "bf16"]
    assert accuracy.main([*argv, "--device", "cpu", "--plot", str(picture)]) == 0
    assert "| LSTM | bf16 | 5 |" in capsys.readouterr().out
    assert picture.stat().st_size > 1000
    for found in accuracy.errors(LSTM, CPU):
        assert found.forward < 1e-6
        assert found.gradients < 1e-5


def test_learning(capsys, tmp_path):
    picture = tmp_path / "learning.png"
    argv = ["--steps", "2", "--seeds", "1", "--device", "cpu", "--threads", "1"]
    assert learning.main([*argv, "--plot", str(picture)]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "FusedLSTM" in line]
    assert len(rows) == 2 * len(learning.TASKS)
    for row in rows:  # after one step of the optimizer nothing has drifted apart
        assert float(row.split("|")[-2]) < 1e-3
    assert picture.stat().st_size > 1000


def test_parity_is_learnt_alike():
    task = dataclasses.replace(learning.parity(T=6, B=8), hidden=8)
    curves = [learning.curve(task, make, 0, 20, CPU) for make in learning.LAYERS.values()]
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-3)
