"""The worked example of docs/adding_a_cell.md, and what a cell of one's own meets on its way."""

import copy
import importlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from concurrent_interpreter import concurrent_grid
from helpers import assert_same, packer, run, sequences
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fused_rnn
from fused_rnn.engines import cells
from fused_rnn.kernels.cell import KernelCell
from fused_rnn.kernels.chips import LIMITS
from fused_rnn.layers.base import FusedRNNBase
from fused_rnn.spec.cells import Cell

ROOT = Path(__file__).parent.parent
NAME = "fused_rnn.examples.minimal_gated_unit"


@pytest.fixture(name="FusedMGU")
def _layer() -> type[FusedRNNBase]:
    """Imported no earlier than a test runs: the import registers a cell for all that come after."""
    layer: type[FusedRNNBase] = importlib.import_module(NAME).FusedMGU
    return layer


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_rnn.engines.triton.support.rnn_precision", lambda: "ieee")


def twins(FusedMGU: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """The eager loop in fp64, and the kernels in fp32 with the same weights."""
    exact = FusedMGU(*args, backend="eager", dtype=torch.float64, **kwargs)
    layer = FusedMGU(*args, backend="triton", **kwargs)
    layer.load_state_dict(exact.state_dict())
    exact.load_state_dict(layer.state_dict())
    return exact, layer


def compare(FusedMGU: Any, device: str, T: int, B: int, H: int, packed: bool, **how: Any) -> None:
    """Outputs and all gradients."""
    exact, layer = twins(FusedMGU, 3, H, **how)
    xs = [torch.randn(T, B, 3)]
    make: Any = lambda xs: xs[0]  # noqa: E731
    if packed:
        xs, make = sequences([max(1, T - b) for b in range(B)], 3, torch.float32), packer(False)
    h0 = torch.randn(layer.num_layers * (2 if layer.bidirectional else 1), B, H)
    expected = run(exact, [x.double() for x in xs], [h0.double()], make)
    found = run(layer.to(device), [x.to(device) for x in xs], [h0.to(device)], make)
    assert_same({name: value.cpu() for name, value in found.items()}, expected, torch.float32)


@pytest.mark.parametrize(
    "how",
    [
        {"packed": False},
        {"packed": False, "num_layers": 2, "bias": False},
        {"packed": True, "bidirectional": True},
        {"packed": True, "bidirectional": True, "recompute": True},
        {"packed": False, "recompute": True, "batch_first": False},
    ],
    ids=["batched", "stack without biases", "packed bi", "packed bi recompute", "recompute"],
)
def test_kernels_against_the_eager_loop(
    FusedMGU: Any, triton_device: str, how: dict[str, Any]
) -> None:
    compare(FusedMGU, triton_device, T=4, B=3, H=7, **how)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_16_bit_types(FusedMGU: Any, triton_device: str, dtype: torch.dtype) -> None:
    exact, layer = twins(FusedMGU, 3, 20)
    exact.load_state_dict(layer.to(dtype).state_dict())
    x = torch.randn(5, 9, 3, dtype=dtype)
    expected = run(exact, [x.double()], None)
    found = run(layer.to(triton_device), [x.to(triton_device)], None)
    for name, value in expected.items():
        error = (found[name].cpu().double() - value).abs().max()
        assert error <= 4 * torch.finfo(dtype).eps * value.abs().max(), name


@pytest.mark.slow
def test_groups_of_programs(
    FusedMGU: Any, triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if triton_device == "cuda":
        compare(FusedMGU, "cuda", T=20, B=19, H=700, packed=True, bidirectional=True)
        return
    monkeypatch.setattr("fused_rnn.engines.triton.devices.device_limits", lambda device: LIMITS[80])
    with concurrent_grid(timeout=600):
        compare(FusedMGU, "cpu", T=2, B=2, H=130, packed=False)


def test_second_order(FusedMGU: Any, triton_device: str) -> None:
    layer = FusedMGU(2, 3, dtype=torch.float64)  # no kernels for fp64: the eager loop
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    call: Any = lambda x, *_: layer(x)[0]  # noqa: E731
    assert gradcheck(call, (x, *layer.parameters()))
    assert gradgradcheck(call, (x, *layer.parameters()))
    layer = FusedMGU(2, 3, backend="triton", device=triton_device)
    x = torch.randn(3, 2, 2, device=triton_device, requires_grad=True)
    (first,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
    assert torch.isfinite(torch.autograd.grad(first.square().sum(), x)[0]).all()


@pytest.mark.parametrize("target", ["80", "90"])
def test_compiled_kernels(target: str, tmp_path: Path) -> None:
    """They build, spill nothing and keep their weights in registers."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = tmp_path / "rows.json"
    code = f"import sys, {NAME}; from bench.static import main; main()"
    command = [sys.executable, "-c", code, "--cell", "mgu", "--hidden", "64", "--target", target]
    command += ["--kernel", "forward", "reverse", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["kernel"] for row in rows] == ["forward", "reverse"]
    for row in rows:
        assert row["spill"] == row["weights_shared"] == row["weights_global"] == 0


def test_torch_compile(FusedMGU: Any) -> None:
    torch._dynamo.reset()
    layer = FusedMGU(3, 5, 2, dtype=torch.float64)
    call = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for T, B in ((4, 2), (7, 3)):
        x = torch.randn(T, B, 3, dtype=torch.float64, requires_grad=True)
        both = [f(x) for f in (layer, call)]
        torch.testing.assert_close(both[1], both[0])
        grads = [torch.autograd.grad(out.sum(), [x, *layer.parameters()]) for out, _ in both]
        torch.testing.assert_close(grads[1], grads[0])
    torch._dynamo.reset()


def test_explain_says_what_runs(FusedMGU: Any) -> None:
    layer, x = FusedMGU(3, 100), torch.randn(4, 2, 3)
    (found,) = fused_rnn.explain(layer, x)
    assert (found.backend, found.reason) == ("eager", "the CPU engine has no sweeps for mgu")
    (found,) = fused_rnn.explain(layer.bfloat16(), x.bfloat16(), 90)
    assert found.backend == "triton"
    assert found.reason.startswith("persistent: 128 units")
    with pytest.raises(RuntimeError, match="backend='cpu' cannot run this layer: the CPU engine"):
        FusedMGU(3, 5, backend="cpu")(x)


def test_a_single_step_without_gradients(FusedMGU: Any) -> None:
    layer, x = FusedMGU(3, 5), torch.randn(1, 2, 3)
    expected = layer(x)[0]
    with torch.no_grad():
        assert torch.equal(layer(x)[0], expected)


def test_copies(FusedMGU: Any) -> None:
    layer, x = FusedMGU(3, 5), torch.randn(4, 2, 3)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x)[0], layer(x)[0])
    assert repr(layer) == "FusedMGU(3, 5)"
    with pytest.raises(ValueError, match="proj_size argument is only supported for LSTM"):
        FusedMGU(3, 5, proj_size=2)


# ---- registration -------------------------------------------------------------------------------


@pytest.fixture
def half_a_cell() -> Iterator[type[FusedRNNBase]]:
    """A layer whose cell has no kernels."""
    cell = Cell("half", gates=2, has_c=False, step=lambda gx, gh, state: (state[0], None))
    cells.register(cell)

    class Half(FusedRNNBase):
        @property
        def _cell(self) -> Cell:
            return cell

        def forward(self, input: Tensor) -> Any:
            return self._run(input, None)

    yield Half
    del cells.CELLS["half"]


def test_a_cell_without_kernels_runs_the_eager_loop(half_a_cell: Any) -> None:
    layer, x = half_a_cell("half", 3, 5), torch.randn(4, 2, 3)
    assert torch.equal(layer(x)[0], torch.zeros(4, 2, 5))
    (found,) = fused_rnn.explain(layer, x, 90)
    assert str(found) == "layer 0: eager: no fused kernel: there are no kernels for half"
    with pytest.raises(RuntimeError, match=r"kernels for half$|Triton runs on"):
        half_a_cell("half", 3, 5, backend="triton")(x)


def test_names_are_taken_once(FusedMGU: Any) -> None:
    for name in ("gru", "mgu"):
        with pytest.raises(ValueError, match=f"there is a cell '{name}' already"):
            cells.register(Cell(name, gates=3, has_c=False, step=cells.GRU.step))


def kernel_cell(x_slots: tuple[int, ...], h_slots: tuple[int, ...], states: int = 1) -> KernelCell:
    nothing: Any = None
    return KernelCell("half", states, x_slots, h_slots, functions=nothing, activate=nothing)


def test_kernels_of_another_cell() -> None:
    for kernels in (kernel_cell((0,), (0,)), kernel_cell((0, 1), (0, 1), states=2)):
        with pytest.raises(ValueError, match="'half' has 2 gates and 1 states, but its kernels"):
            cells.register(Cell("half", 2, has_c=False, step=cells.GRU.step, kernels=kernels))
    assert "half" not in cells.CELLS


@pytest.mark.parametrize(
    ("x_slots", "h_slots"),
    [
        ((0, 0), (0, 0)),
        ((0, 4), (0, 4)),
        ((1, 3), (1, 2)),  # the recurrent part must have slot 3
        ((3, 2), (3, 3)),
        ((1,), (1,)),  # a gate alone has the only slot
    ],
    ids=str,
)
def test_slots_that_the_kernels_do_not_have(
    x_slots: tuple[int, ...], h_slots: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=f"the kernels cannot run {len(h_slots)} gates"):
        kernel_cell(x_slots, h_slots)


def test_states_that_the_kernels_do_not_have() -> None:
    with pytest.raises(ValueError, match="and 5 states"):
        kernel_cell((0,), (0,), states=5)
