"""The same contenders under pytest-benchmark, to compare one state of the code with another.

    pytest bench --benchmark-autosave           # kept in .benchmarks/
    pytest bench --benchmark-compare            # against the last one kept

A CPU always, a GPU where there is one. Small cases, for changes; `bench.run` is for figures.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bench.cases import CELLS, Case, products
from bench.providers import ON_CPU, PROVIDERS
from bench.run import contender

GPU = torch.cuda.is_available()
CASES = [(Case(cell, "fp32", 128, 16, 64, 64), "cpu", ON_CPU) for cell in CELLS]
CASES += [
    (Case(cell, "bf16", 256, 16, H, H), "cuda", ("torch.nn", "fused_rnn"))
    for cell in ("gru", "lstm")
    for H in (128, 512)
    if GPU
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # two wait for each other where others use the machine
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("mode", ["train", "forward"])
@pytest.mark.parametrize(
    ("case", "device", "name"),
    [pytest.param(c, d, name, id=f"{c}-{d}-{name}") for c, d, names in CASES for name in names],
)
def test_layer(benchmark: Any, case: Case, device: str, name: str, mode: str) -> None:
    benchmark.group = f"{case} {mode} ({device})"
    where = torch.device(device)
    with products(case.dtype):
        run: Callable[[], object] = contender(PROVIDERS[name], case, mode, where)[0]

        def finished() -> None:
            run()
            if device == "cuda":
                torch.cuda.synchronize()

        benchmark(finished)
