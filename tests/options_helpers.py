"""What the tests of options share: sizes, random resets, calls and their gradients."""

import itertools
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

T, B, I, H = 6, 5, 3, 4
LENGTHS = [6, 2, 5, 1, 6]
both_directions = pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])


def random_reset() -> Tensor:
    reset = torch.rand(T, B) < 0.4
    reset[0, 0], reset[0, 1] = True, False
    return reset


def segments(reset: Tensor | None, length: int, b: int) -> list[tuple[int, int]]:
    """First and last step, exclusive, of what a sequence falls into."""
    cuts = [] if reset is None else [t for t in range(length) if reset[t, b]]
    ends = sorted({0, *cuts, length})
    return list(itertools.pairwise(ends))


def by_segments(
    plain: nn.Module, x: Tensor, hx: tuple[Tensor, ...], lengths: list[int], reset: Tensor | None
) -> list[Tensor]:
    """``plain`` on every segment: outputs with zeros behind them, and the final states.

    ``hx`` [D, B, .] is where the first segment begins, in reverse where the last one does, as long
    as no reset comes before it.
    """
    D = 2 if plain.bidirectional else 1
    width = plain.proj_size or plain.hidden_size
    outputs = []
    finals: list[list[list[Tensor]]] = [[[], []] for _ in hx]
    for b, length in enumerate(lengths):
        parts = []
        found = segments(reset, length, b)
        for k, (first, last) in enumerate(found):
            begins = [reset is None or (k == 0 and not reset[0, b]), k == len(found) - 1]
            state = [torch.stack([s[d, b] * begins[d] for d in range(D)]).unsqueeze(1) for s in hx]
            out, final = plain(x[first:last, b : b + 1], tuple(state) if len(hx) == 2 else state[0])
            parts.append(out[:, 0])
            for kept, s in zip(finals, final if len(hx) == 2 else (final,), strict=True):
                if k == len(found) - 1:
                    kept[0].append(s[0, 0])
                if k == 0 and D == 2:
                    kept[1].append(s[1, 0])
        parts.append(x.new_zeros(T - length, D * width))
        outputs.append(torch.cat(parts))
    states = [torch.stack([torch.stack(kept[d]) for d in range(D)]) for kept in finals]
    return [torch.stack(outputs, 1), *states]


def results(layer: nn.Module, found: list[Tensor], inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Outputs, and gradients of a fixed linear loss."""
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in found]
    loss = sum((o.double() * w).sum() for o, w in zip(found, weights, strict=True))
    assert isinstance(loss, Tensor)
    names = [f"input {i}" for i in range(len(inputs))] + [n for n, _ in layer.named_parameters()]
    grads = torch.autograd.grad(loss, [*inputs, *layer.parameters()])
    named = {f"output {i}": o for i, o in enumerate(found)}
    return named | {f"grad {n}": g for n, g in zip(names, grads, strict=True)}


def make_inputs(layer: nn.Module, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    D, widths = 2 if layer.bidirectional else 1, [layer.proj_size or layer.hidden_size]
    if "LSTM" in type(layer).__name__:
        widths.append(layer.hidden_size)
    shapes = [(T, B, I), *((D, B, w) for w in widths)]
    return tuple(torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes)


def call(layer: nn.Module, inputs: tuple[Tensor, ...], **keywords: Any) -> list[Tensor]:
    x, *hx = inputs
    output, final, *more = layer(x, tuple(hx) if len(hx) == 2 else hx[0], **keywords)
    return [output, *(final if isinstance(final, tuple) else (final,)), *more]
