"""From a layer to its launches: what the JIT is asked, what is launched directly, what fails."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import plan_request
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

import fused_rnn
from bench.host import IdleKernel, idle_gpu
from fused_rnn.cells import builtin as cells
from fused_rnn.engines.triton import devices, plans
from fused_rnn.kernels import launch, pack, variants
from fused_rnn.kernels.chips import LIMITS, Limits
from fused_rnn.kernels.plan import MOST_TILES, Plan
from fused_rnn.kernels.planner import make_plan
from fused_rnn.kernels.sweep import DeviceLayout, Sweep

ROOT = Path(__file__).resolve().parents[1]
LAYERS = {
    "tanh": fused_rnn.FusedRNN,
    "gru": fused_rnn.FusedGRU,
    "lstm": fused_rnn.FusedLSTM,
}


@pytest.fixture
def kernels() -> Iterator[dict[str, IdleKernel]]:
    with idle_gpu() as found:
        yield found


def train(layer: Any, x: Any, **how: Any) -> None:
    output = layer(x, **how)[0]
    (output if isinstance(output, Tensor) else output.data).sum().backward()


def new_kernels(kernels: dict[str, IdleKernel]) -> int:
    """Kernels that the JIT would have been asked for since the last look."""
    count = sum(len(k.found) for k in kernels.values())
    for kernel in kernels.values():
        kernel.found.clear()
    return count


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("H", [8, 256], ids=["persistent", "group"])
@pytest.mark.parametrize("kind", LAYERS)
def test_nothing_is_compiled_for_another_size(
    kind: str, H: int, bidirectional: bool, kernels: dict[str, IdleKernel]
) -> None:
    layer = LAYERS[kind](5, H, 2, bidirectional=bidirectional, backend="triton")
    spec = {"tanh": "rnn_tanh"}.get(kind, kind)
    plan = make_plan(plan_request(spec, H, 4, 4, 2 if bidirectional else 1), LIMITS[90])
    with plans.forced(lambda *_: plan):  # a batch of another size may have another plan
        train(layer, torch.randn(4, 3, 5))
        assert new_kernels(kernels) > 0
        for T, B in ((4, 3), (1, 3), (7, 1), (2, 2), (3, 7), (3, 8), (3, 9), (5, 17), (2, 64)):
            train(layer, torch.randn(T, B, 5))
            assert new_kernels(kernels) == 0, (T, B)
        lengths = ([4, 3, 1], [2, 1], [5, 5, 5, 2, 1, 1, 1, 1, 1], list(range(17, 0, -1)))
        for n, each in enumerate(lengths):
            x = torch.randn(each[0], len(each), 5)
            train(layer, pack_padded_sequence(x, torch.tensor(each)))
            assert (new_kernels(kernels) == 0) is (n > 0), each
        with torch.no_grad():
            for n, (T, B) in enumerate(((4, 3), (1, 1), (6, 19))):
                layer(torch.randn(T, B, 5))
                assert (new_kernels(kernels) == 0) is (n > 0), (T, B)


def test_triton_looks_at_no_alignment_that_changes() -> None:
    """Of what is cut out of a stack's states, or comes from a user; sizes: test_kernels_compile."""
    code = """if True:
        from fused_rnn.kernels import launch, variants
        for kernel in (variants.forward_kernel, variants.backward_kernel):
            anywhere = {p.name for p in kernel.params if p.do_not_specialize_on_alignment}
            assert anywhere == launch.ANY_ALIGNMENT & set(kernel.arg_names), anywhere
    """
    compiled = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, env=compiled, cwd=ROOT)


def test_a_direct_launch_has_the_same_arguments(kernels: dict[str, IdleKernel]) -> None:
    """By position what the JIT got by name, of every kernel."""
    layer = fused_rnn.FusedGRU(5, 8, backend="triton")
    x = torch.randn(4, 3, 5, requires_grad=True)
    train(layer, x)
    first = {name: kernel.found[-1] for name, kernel in kernels.items()}
    train(layer, x)
    for name, kernel in kernels.items():
        named = dict(zip(kernel.arg_names, kernel.direct[-1], strict=True))
        options = first[name].keys() - named.keys()
        assert options <= {"num_warps", "num_stages", "enable_fp_fusion"}
        for argument, value in named.items():
            other = first[name][argument]
            if isinstance(value, Tensor):
                assert (value.shape, value.dtype) == (other.shape, other.dtype), argument
            else:
                assert value == other, argument


def test_memory_that_is_not_aligned(kernels: dict[str, IdleKernel]) -> None:
    """A gradient at an odd address goes through the JIT, which makes another kernel of it."""
    layer = fused_rnn.FusedLSTM(5, 8, backend="triton")
    grads = torch.randn(1 + 4 * 3 * 8)
    x = torch.randn(4, 3, 5)
    layer(x)[0].backward(grads[:-1].view(4, 3, 8))
    layer(x)[0].backward(grads[:-1].view(4, 3, 8))
    new_kernels(kernels)
    layer(x)[0].backward(grads[1:].view(4, 3, 8))
    assert [len(k.found) for k in kernels.values()] == [0, 1, 0, 0]
    layer(x)[0].backward(grads[:-1].view(4, 3, 8))
    assert [len(k.found) for k in kernels.values()] == [0, 1, 0, 0]


def test_kernels_get_rows_one_behind_the_other(kernels: dict[str, IdleKernel]) -> None:
    """They know no strides: whatever a user passes or puts in a parameter's place."""

    def strided(t: Tensor) -> Tensor:
        return torch.stack([t, t], -1)[..., 0]

    for kind, recompute in (("tanh", False), ("gru", False), ("lstm", False), ("lstm", True)):
        layer = LAYERS[kind](
            5, 8, backend="triton", bidirectional=True, recompute=recompute, zoneout=0.5
        )
        for name, parameter in list(layer.named_parameters()):
            setattr(layer, name, torch.nn.Parameter(strided(parameter.detach())))
        hx = [strided(torch.randn(2, 3, 8)) for _ in range(2 if kind == "lstm" else 1)]
        lengths, reset = strided(torch.tensor([4, 1, 3])), strided(torch.ones(4, 3).bool())
        x = strided(torch.randn(4, 3, 5)).requires_grad_()
        output, final = layer(
            x, tuple(hx) if kind == "lstm" else hx[0], lengths=lengths, reset=reset
        )
        outputs = [output, *(final if kind == "lstm" else [final])]
        torch.autograd.backward(outputs, [strided(torch.randn(t.shape)) for t in outputs])
    for name, kernel in kernels.items():
        found = [dict(zip(kernel.arg_names, a, strict=True)) for a in kernel.direct] + kernel.found
        assert found, name
        for arguments in found:
            tensors = {n: t for n, t in arguments.items() if isinstance(t, Tensor)}
            assert [n for n, t in tensors.items() if not t.is_contiguous()] == [], name


def an_rnn() -> tuple[Plan, launch.Variant]:
    """A plan, and the forward sweep under it."""
    plan = make_plan(plan_request("rnn_tanh", 8, 4, 1), LIMITS[90])
    layout = DeviceLayout(1, 1, 1)
    sweep = Sweep(cells.RNN_TANH.kernels, layout, (False,), "tf32", plan)
    return plan, variants.forward_variant(sweep, 8, False, None)


def test_numbers_of_another_type(kernels: dict[str, IdleKernel]) -> None:
    """Triton would make a constant of an integer 1, and other integers of a whole number."""
    x = torch.randn(4, 3, 5)
    for n, clip in enumerate((1, 5, 16, 0.5)):
        layer = fused_rnn.FusedLSTM(5, 8, backend="triton", clip_recurrent_grad=clip)
        train(layer, x)
        assert (new_kernels(kernels) == 0) is (n > 0), clip
        layer.clip_recurrent_grad = 7
        train(layer, x)
        (*_, last) = kernels["backward_kernel"].direct
        value = last[kernels["backward_kernel"].arg_names.index("clip")]
        assert (type(value), value) == (float, 7)
    plan, variant = an_rnn()
    kernel = kernels["forward_kernel"]
    tensors, names = dict.fromkeys(kernel.arg_names[:20]), kernel.arg_names[20:28]
    for zoneout, count in ((None, 1), (0.5, 2), (1, 3), (0.25, 3), (None, 3)):
        numbers = dict.fromkeys(names, 1) | {"zoneout": zoneout}
        what = launch.Launch(variant, plan, 1, torch.device("cpu"), dict(tensors), numbers)
        launch.launch(what)
        assert len(kernel.found) == count


def test_rows_beyond_32_bits(kernels: dict[str, IdleKernel]) -> None:
    plan, variant = an_rnn()
    tensors = dict.fromkeys(kernels["forward_kernel"].arg_names[:20])
    names = kernels["forward_kernel"].arg_names[20:28]
    for N, found in ((100, 1), (100, 1), (2**31, 2), (100, 2), (2**31, 2)):
        numbers = dict.fromkeys(names, 1) | {"N": N, "zoneout": None}
        what = launch.Launch(variant, plan, 1, torch.device("cpu"), dict(tensors), numbers)
        launch.launch(what)
        assert len(kernels["forward_kernel"].found) == found


def test_a_cell_that_changes_is_launched_anew(
    kernels: dict[str, IdleKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = fused_rnn.FusedRNN(5, 8, backend="triton")
    x = torch.randn(4, 3, 5)
    train(layer, x)
    new_kernels(kernels)
    cell = cells.RNN_TANH.kernels
    changed = cell.functions()._replace(step=cells.RNN_RELU.kernels.functions().step)
    monkeypatch.setitem(vars(cell), "functions", lambda: changed)
    train(layer, x)
    (arguments,) = kernels["forward_kernel"].found
    assert arguments["STEP"] is changed.step


# ---- many batch tiles ---------------------------------------------------------------------------


@pytest.mark.parametrize("B", [524_280, 524_281, 1_600_000])
def test_more_tiles_than_a_grid_has(B: int) -> None:
    plan = make_plan(plan_request("lstm", 8, 4, 1, 1), LIMITS[90])
    assert (plan.programs, plan.tiles, plan.block_b) == (1, 0, 8)
    launches = list(plan.launches(B, 1))
    assert all(0 < tiles <= MOST_TILES for _, tiles, _, _ in launches)
    covered = [t for tile, tiles, _, _ in launches for t in range(tile, tile + tiles)]
    assert covered == list(range(-(-B // 8)))


# ---- what fails ---------------------------------------------------------------------------------


class FailingKernel(IdleKernel):
    """Refuses a launch of more than ``programs`` as a driver does, or fails."""

    def __init__(self, kernel: Any, programs: int, error: Exception | None = None) -> None:
        super().__init__(kernel)
        self.programs, self.error, self.grids = programs, error, []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def launched(**arguments: Any) -> None:
            self.grids.append(grid)
            if self.error is not None:
                raise self.error
            cooperative = arguments.get("launch_cooperative_grid", False)
            if cooperative and grid[0] * grid[1] * grid[2] > self.programs:
                raise RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch")

        return launched


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H100 whose limits change as those of a real device; plans are not forced."""
    monkeypatch.setattr(devices, "_refused", {})
    gpu = torch.device("cuda", 0)

    def device_limits(device: torch.device) -> Limits:
        return replace(LIMITS[90], most_programs=devices._refused.get(device))

    device_limits.cache_clear = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setattr(devices, "kernel_device", lambda _: gpu)
    monkeypatch.setattr(devices, "device_limits", device_limits)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(plans, "_chosen", {})
    monkeypatch.setattr(pack, "launch_once", lambda *_: None)


def test_a_refused_group_is_planned_anew(limits: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half as many programs, then a quarter; both sweeps; and one warning in all."""
    layer = fused_rnn.FusedLSTM(8, 512, backend="triton", dtype=torch.bfloat16)
    x = torch.randn(3, 64, 8, dtype=torch.bfloat16)
    before = fused_rnn.explain(layer, x)[0].reason
    failing = [
        FailingKernel(variants.forward_kernel, 40),
        FailingKernel(variants.backward_kernel, 40),
    ]
    monkeypatch.setattr(variants, "forward_kernel", failing[0])
    monkeypatch.setattr(variants, "backward_kernel", failing[1])
    with pytest.warns(UserWarning, match="refused a cooperative launch") as caught:
        output = layer(x)[0]
    assert len(caught) == 1
    programs = [grid[0] * grid[1] * grid[2] for grid in failing[0].grids]
    assert programs[0] > 80 >= 40 >= programs[-1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output.sum().backward()
        layer(x)[0].sum().backward()
    assert all(g[0] * g[1] * g[2] <= 40 for g in failing[0].grids[-2:] + failing[1].grids[-2:])
    after = fused_rnn.explain(layer, x)[0].reason
    assert after != before


def test_a_refusal_takes_back_no_other(limits: None) -> None:
    """Backward may still ask for what another layer has been refused in the meantime."""
    gpu = torch.device("cuda", 0)
    with pytest.warns(UserWarning, match="refused a cooperative launch"):
        devices.limit_programs(gpu, 4)
    devices.limit_programs(gpu, 16)
    assert devices.device_limits(gpu).most_programs == 4
    devices.limit_programs(gpu, 2)
    assert devices.device_limits(gpu).most_programs == 2


def test_no_groups_at_all(limits: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """If not even two programs may wait for each other: an error, and no plan from then on."""
    layer = fused_rnn.FusedLSTM(8, 512, dtype=torch.bfloat16, backend="triton")
    x = torch.randn(3, 4, 8, dtype=torch.bfloat16)
    monkeypatch.setattr(variants, "forward_kernel", FailingKernel(variants.forward_kernel, 0))
    with (
        pytest.warns(UserWarning, match="refused a cooperative launch"),
        pytest.raises(RuntimeError, match="and no plan has fewer programs: lstm with H = 512"),
    ):
        layer(x)
    with pytest.raises(RuntimeError, match="backend='triton' cannot run lstm"):
        layer(x)


def test_a_small_group_falls_to_one_program(limits: None, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = fused_rnn.FusedLSTM(8, 64, dtype=torch.bfloat16, backend="triton")
    x = torch.randn(3, 4, 8, dtype=torch.bfloat16)
    request = plan_request("lstm", 64, torch.bfloat16, 4, 1, "ieee")
    group = next(p for p in plans.planned(request, LIMITS[90]) if p.programs > 1)
    kernel = FailingKernel(variants.forward_kernel, 1)
    monkeypatch.setattr(variants, "forward_kernel", kernel)
    choose = plans.choose_plan

    def chosen(request: Any, limits: Limits, device: torch.device) -> Plan:
        return group if limits.most_programs is None else choose(request, limits, device)

    monkeypatch.setattr("fused_rnn.engines.triton.support.choose_plan", chosen)
    with pytest.warns(UserWarning, match="refused a cooperative launch"), torch.no_grad():
        layer(x)
    assert [grid[0] for grid in kernel.grids] == [group.programs, 1]


def test_a_forced_plan_is_not_replaced(limits: None, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = fused_rnn.FusedLSTM(8, 512, dtype=torch.bfloat16, backend="triton")
    request = plan_request("lstm", 512, torch.bfloat16, 4, 1, "ieee")
    plan = plans.planned(request, LIMITS[90])[0]
    monkeypatch.setattr(variants, "forward_kernel", FailingKernel(variants.forward_kernel, 8))
    with (
        plans.forced(lambda *_: plan),
        pytest.warns(UserWarning, match="refused"),
        pytest.raises(RuntimeError, match="too many blocks in cooperative launch"),
    ):
        layer(torch.randn(3, 4, 8, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    "error",
    [
        OutOfResources(300_000, 232_448, "shared memory"),
        CompilationError(None, None, "no such instruction"),
        RuntimeError("an illegal address"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_names_the_plan(
    error: Exception, kernels: dict[str, IdleKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        variants, "forward_kernel", FailingKernel(variants.forward_kernel, 0, error)
    )
    layer = fused_rnn.FusedLSTM(5, 8, backend="triton")
    with pytest.raises(RuntimeError, match="a sweep failed, planned as persistent: 16 units x 8"):
        layer(torch.randn(4, 3, 5))
