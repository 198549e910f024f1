"""Settings of every test: few threads, fixed seeds, and fresh memory that is poisoned with NaN."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import quick_interpreter
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # Read when Triton is first imported: without a GPU its interpreter runs the kernels.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    quick_interpreter.install()
else:
    # What cuBLAS wants for the deterministic mode below; read when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

settings.register_profile("default", deadline=None, derandomize=True)  # timing decides no test
settings.load_profile("default")
# Workers of pytest-xdist share the cores, and threads that wait for each other do not.
threads = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
torch.set_num_threads(min(threads, os.cpu_count() or 1))


GPU_TEST_SECONDS = 60


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test on a GPU that hangs ends its process, of which pytest-xdist starts another.

    A wait for a GPU cannot be interrupted by a signal, and a kernel that spins ends with its
    process alone, so the method is "thread". See CONTRIBUTING.md.
    """
    for item in items:
        if item.get_closest_marker("gpu") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(GPU_TEST_SECONDS, method="thread"))


@pytest.fixture(
    params=[pytest.param("cpu", id="interpreter"), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def triton_device(request: pytest.FixtureRequest) -> str:
    """Where the kernels run: the CPU, by Triton's interpreter, or a GPU."""
    device: str = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA or ROCm device")
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("TRITON_INTERPRET is not 1: with a GPU, the interpreter runs on demand only")
    return device


@pytest.fixture(autouse=True)
def _fp32_precision(request: pytest.FixtureRequest) -> Iterator[None]:
    """No TF32 on a GPU, which recurrent layers take by default: tolerances of fp32 are for fp32.

    Of torch.nn's layers, of ours, and of the products of a test itself. `allow_tf32` is the older
    switch of cuDNN, by which torch.export asks. What a test changes is put back.
    """
    cudnn: Any = torch.backends.cudnn
    switches = (cudnn.rnn, cudnn.conv, torch.backends.cuda.matmul)
    before = [switch.fp32_precision for switch in switches]
    on_gpu = request.node.get_closest_marker("gpu") is not None
    if on_gpu:
        torch._C._set_cudnn_allow_tf32(False)  # the attribute is frozen by torch.testing._internal
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    yield
    if on_gpu:
        torch._C._set_cudnn_allow_tf32(True)
    for switch, setting in zip(switches, before, strict=True):
        if switch.fp32_precision != setting:
            switch.fp32_precision = setting


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fill torch.empty with NaN, so that an element that nobody writes fails its test."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
