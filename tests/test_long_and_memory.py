"""Long sequences, memory over many steps, repeatability, and what ragged batches cost."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import packer, run, sequences, twins
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import fused_rnn


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tanh", "gru", "lstm"])
def test_seventy_thousand_steps(kind: str) -> None:
    """cuDNN refuses more than 65,535. Forward and backward, the end of both against torch.nn."""
    T, end = 70_000, 300
    plain, fused = twins(kind, 1, 2)
    x = torch.randn(T, 1, 1, requires_grad=True)
    output, final = fused(x)
    with torch.no_grad():
        _, state = fused(x[:-end])
    tail = x.detach()[-end:].requires_grad_()
    expected, expected_final = plain(tail, state)
    torch.testing.assert_close(output[-end:], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(final, expected_final, rtol=1e-4, atol=1e-5)
    (slope,) = torch.autograd.grad(output[-9:].sum(), x)
    (expected_slope,) = torch.autograd.grad(expected[-9:].sum(), tail)
    torch.testing.assert_close(slope[-end:], expected_slope, rtol=1e-4, atol=1e-5)
    assert torch.isfinite(slope).all()


# ---- memory -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the resident size is read from /proc")
def test_training_does_not_grow() -> None:
    """200 steps of every engine, in a process of its own; and that a leak would show."""
    worker = Path(__file__).with_name("memory_worker.py")
    paths = [str(worker.parents[1]), os.environ.get("PYTHONPATH", "")]
    result = subprocess.run(
        [sys.executable, str(worker)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = {name: (int(n), int(m)) for name, n, m in map(str.split, result.stdout.splitlines())}
    objects, memory = found.pop("leak")
    assert objects >= 200
    assert memory > 16 * 2**20
    assert len(found) == 7
    for name, (objects, memory) in found.items():
        assert objects < 20, f"{name} leaves {objects} objects"
        assert memory < 8 * 2**20, f"{name} leaves {memory} bytes"


# ---- repeatability ------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("relu", {}),
        ("gru", {"backend": "eager"}),
        ("gru", {"recompute": True}),
        ("lstm", {}),
        ("projected", {}),
    ],
    ids=["relu", "eager", "recompute", "lstm", "projected"],
)
def test_runs_are_bitwise_equal(kind: str, options: dict[str, Any], packed: bool) -> None:
    _, layer = twins(kind, 7, 33, num_layers=2, bidirectional=True, **options)
    if packed:
        xs, make = sequences([9, 2, 5, 5, 1], 7, torch.float32), packer(False)
    else:
        xs, make = [torch.randn(9, 5, 7)], lambda xs: xs[0]
    first = run(layer, xs, None, make)
    for _ in range(4):
        again = run(layer, xs, None, make)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("kind", ["tanh", "gru", "lstm"])
def test_runs_of_the_kernels_are_bitwise_equal(kind: str, triton_device: str) -> None:
    _, layer = twins(kind, 3, 5, bidirectional=True, backend="triton")
    layer.to(triton_device)
    xs = [torch.randn(3, 2, 3, device=triton_device)]
    first = run(layer, xs, None)
    for _ in range(3):
        again = run(layer, xs, None)
        assert all(torch.equal(first[name], again[name]) for name in first)


# ---- what runs ----------------------------------------------------------------------------------


class Count(TorchDispatchMode):
    """Counts PyTorch operations."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def count(layer: nn.Module, x: Any) -> int:
    with Count() as counter:
        output = layer(x)[0]
        (output if isinstance(output, Tensor) else output.data).sum().backward()
    return counter.calls


@pytest.mark.parametrize("kind", ["tanh", "gru", "projected"])
def test_ragged_batches_cost_no_more_steps(kind: str) -> None:
    """Many sequences of a few lengths take as many operations as if all were of the longest.

    torch.nn's packed layers take several times as many.
    """
    _, layer = twins(kind, 3, 8)
    lengths = [100] * 8 + [60] * 8 + [20] * 8
    ragged = count(layer, pack_sequence(sequences(lengths, 3, torch.float32)))
    uniform = count(layer, torch.randn(100, 24, 3))
    assert ragged < 1.5 * uniform


def test_training_in_bf16() -> None:
    """Parameters and all in bf16, no autocast: the loss falls as in fp32."""
    torch.manual_seed(0)
    x = torch.randn(8, 16, 3)
    target = x.cumsum(0)[..., :1].tanh()
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(1)
        layer = fused_rnn.FusedGRU(3, 16, dtype=dtype)
        head = nn.Linear(16, 1, dtype=dtype)
        parameters = [*layer.parameters(), *head.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=0.2, momentum=0.9)
        for _ in range(60):
            optimizer.zero_grad()
            loss = (head(layer(x.to(dtype))[0]).float() - target).square().mean()
            loss.backward()
            optimizer.step()
        losses[dtype] = loss.item()
    assert losses[torch.bfloat16] < 1.2 * losses[torch.float32]
    assert losses[torch.float32] < 0.1
