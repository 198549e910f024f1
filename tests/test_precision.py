"""Full fp32 from three bf16 parts: what is lost, against torch.nn in fp32.

The tensor cores are emulated, and taken for worse than they are: see bench/split_accuracy.py.
"""

import itertools

import pytest
import torch

from bench import split_accuracy


def test_the_parts_are_the_number() -> None:
    """Three times 8 bits, signs included, are all 24 of an fp32 number, unless it is tiny."""
    x = torch.cat([torch.randn(10000), 2.0 ** torch.arange(-90, 127), torch.zeros(1)])
    parts = split_accuracy.split(torch.cat([x, x * (1 + 2**-23), x * (1 - 2**-24)]))
    assert torch.equal(sum(parts).float(), torch.cat([x, x * (1 + 2**-23), x * (1 - 2**-24)]))
    assert all((b.abs() <= a.abs() * 2**-8).all() for a, b in itertools.pairwise(parts))


@pytest.mark.parametrize("slices", [1, 4])
def test_a_product(slices: int) -> None:
    """Its error is that of a sum in fp32."""
    torch.manual_seed(0)
    w, x = torch.randn(64, 256), torch.randn(256, 4)
    exact = w.double() @ x.double()
    error = (split_accuracy.product(w, x, slices) - exact).abs().max()
    assert error < 2 * (w @ x - exact).abs().max()


@pytest.mark.parametrize("cell", split_accuracy.CELLS)
def test_a_layer_is_as_accurate_as_torch_nn(cell: str) -> None:
    """Output and all gradients: at most twice its error in fp32, and one rounding."""
    for name, (ours, theirs) in split_accuracy.errors(cell, H=32, T=40).items():
        assert ours <= 2 * theirs + 2**-24, name
