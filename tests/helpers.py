"""What the tests share: the cells, one comparison, the fp64 oracle, inputs of every kind."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fused_rnn
from fused_rnn.cells.builtin import CELLS
from fused_rnn.engines.dispatch import Backend
from fused_rnn.kernels.plan import PlanRequest, Precision

# name: (torch.nn's layer, ours, keyword arguments of both)
LAYERS: dict[str, tuple[type[nn.Module], type[nn.Module], dict[str, Any]]] = {
    "tanh": (nn.RNN, fused_rnn.FusedRNN, {}),
    "relu": (nn.RNN, fused_rnn.FusedRNN, {"nonlinearity": "relu"}),
    "gru": (nn.GRU, fused_rnn.FusedGRU, {}),
    "lstm": (nn.LSTM, fused_rnn.FusedLSTM, {}),
    "projected": (nn.LSTM, fused_rnn.FusedLSTM, {"proj_size": 1}),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)
every_backend = pytest.mark.parametrize("backend", ["cpu", "eager"])

# Largest error and RMS error, both relative to the RMS of the reference: rounding of a value that
# sums up to a few hundred products, through up to some dozens of steps. (16-bit types are held
# against torch.nn's own error, see assert_no_worse.)
TOLERANCE = {torch.float64: (1e-11, 1e-12), torch.float32: (2e-5, 2e-6)}


def assert_close(
    found: Tensor,
    expected: Tensor,
    name: str,
    dtype: torch.dtype | None = None,
    growth: float = 1.0,
    of_largest: float | None = None,
) -> None:
    """Same shape, nothing non-finite, and errors within ``growth`` tolerances of ``dtype``.

    Errors are relative to the RMS of the reference, or to 0.1 where that is smaller: gates and
    states are of order one, and a small sum of theirs has their absolute error. With ``of_largest``
    only the largest one counts, relative to the reference's largest value, or to 1.
    """
    assert found.shape == expected.shape, f"{name}: {found.shape} instead of {expected.shape}"
    assert torch.isfinite(found).all(), f"{name} is not finite"
    error, scale = found.double() - expected.double(), expected.double()
    if of_largest is not None:
        limit = of_largest * max(1.0, scale.abs().max().item())
        assert error.abs().max() <= limit, f"{name}: error {error.abs().max():.2e} of {limit:.2e}"
        return
    largest, rms = (growth * limit for limit in TOLERANCE[dtype or found.dtype])
    floor = max(scale.square().mean().sqrt().item(), 0.1)
    assert error.abs().max() <= largest * floor, f"{name}: largest error {error.abs().max():.2e}"
    root = error.square().mean().sqrt()
    assert root <= rms * floor, f"{name}: RMS error {root:.2e} of {floor:.2e}"


def plan_request(
    cell: str,
    H: int,
    dtype: torch.dtype | int,
    B: int,
    D: int = 1,
    precision: Precision = "tf32",
    fast: bool = True,
) -> PlanRequest:
    """What the planner is asked for a cell, named; ``dtype`` may be the bytes of an element."""
    kernels = CELLS[cell].kernels
    assert kernels is not None
    if isinstance(dtype, int):
        dtype = {2: torch.bfloat16, 4: torch.float32}[dtype]
    return PlanRequest(kernels, H, dtype, B, D, precision, fast)


def twins(
    kind: str, *args: Any, backend: Backend = "auto", recompute: bool = False, **kwargs: Any
) -> tuple[nn.Module, nn.Module]:
    """torch.nn's layer and ours with the same parameters."""
    theirs, ours, extra = LAYERS[kind]
    plain = theirs(*args, **extra, **kwargs)
    fused = ours(*args, **extra, **kwargs, backend=backend, recompute=recompute)
    fused.load_state_dict(plain.state_dict())
    return plain, fused


def states(layer: nn.Module, batch: int | None) -> tuple[Tensor, ...]:
    """Random initial states, without a batch axis where ``batch`` is None."""
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    widths = [layer.proj_size or layer.hidden_size]
    if isinstance(layer, (nn.LSTM, fused_rnn.FusedLSTM)):
        widths.append(layer.hidden_size)
    like = layer.weight_ih_l0
    middle = () if batch is None else (batch,)
    return tuple(torch.randn(count, *middle, w, dtype=like.dtype) for w in widths)


@torch.no_grad()
def away_from_kinks(kind: str, layer: nn.Module) -> None:
    """Keep 16-bit units where a rounding of h is no more than a rounding of the results.

    A ReLU that a rounding moves across zero has another gradient altogether, in torch.nn's layer or
    in ours: each unit gets a bias that keeps it on its side. Near 1, the factor 1 - h^2 of a tanh
    has no digits left once h is rounded: smaller weights keep it away from there.
    """
    for name, parameter in layer.named_parameters():
        if name.startswith("weight"):
            parameter.mul_(0.25)
        elif kind == "relu" and name.startswith("bias_hh"):
            signs = 1 - torch.arange(len(parameter)) % 2 * 2.0
            parameter.copy_(4 * signs)


def tensors(result: Any) -> list[Tensor]:
    """The tensors of a layer's result, in order: output, then final states."""
    output, final = result
    if isinstance(output, PackedSequence):
        output = output.data
    return [output, *(final if isinstance(final, tuple) else (final,))]


def run(
    layer: nn.Module,
    xs: Sequence[Tensor],
    hx: Sequence[Tensor] | None,
    make: Callable[[list[Tensor]], Any] = lambda xs: xs[0],
    gradients: bool = True,
    **call: Any,
) -> dict[str, Tensor]:
    """Outputs and, of a fixed random linear loss, the gradients of all inputs and parameters."""
    xs = [x.detach().clone().requires_grad_(gradients) for x in xs]
    hs = [h.detach().clone().requires_grad_(gradients) for h in hx or ()]
    argument = None if hx is None else tuple(hs) if len(hs) == 2 else hs[0]
    found = tensors(layer(make(list(xs)), argument, **call))
    results = dict(zip(("output", "h_n", "c_n"), found, strict=False))
    if gradients:
        generator = torch.Generator().manual_seed(7)
        weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in found]
        weights = [w.to(t.device) for t, w in zip(found, weights, strict=True)]
        loss = sum((t.double() * w).sum() for t, w in zip(found, weights, strict=True))
        assert isinstance(loss, Tensor)
        names = [n for n, _ in layer.named_parameters()]
        wanted = [*xs, *hs, *layer.parameters()]
        labels = [f"d{i}" for i in range(len(xs))] + ["dh_0", "dc_0"][: len(hs)]
        grads = torch.autograd.grad(loss, wanted)
        results |= {f"grad {n}": g for n, g in zip(labels + names, grads, strict=True)}
    return results


def assert_same(
    found: dict[str, Tensor],
    expected: dict[str, Tensor],
    dtype: torch.dtype | None = None,
    growth: float = 1.0,
) -> None:
    """Every result close to its namesake."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert_close(value, expected[name], name, dtype, growth)


def assert_no_worse(
    found: dict[str, Tensor], theirs: dict[str, Tensor], exact: dict[str, Tensor]
) -> None:
    """Largest errors at most twice those of torch.nn in the same type, both against fp64.

    One more rounding of the result is granted: of a few products torch.nn may be exact by luck.
    """
    for name, value in exact.items():
        assert torch.isfinite(found[name]).all(), f"{name} is not finite"
        mine = (found[name].double() - value).abs().max()
        other = (theirs[name].double() - value).abs().max()
        rounding = torch.finfo(theirs[name].dtype).eps * value.abs().max()
        assert mine <= 2 * other + rounding + 1e-5, f"{name}: {mine:.2e}, torch.nn {other:.2e}"


def sequences(lengths: Iterable[int], size: int, dtype: torch.dtype) -> list[Tensor]:
    """Random sequences of these lengths."""
    return [torch.randn(t, size, dtype=dtype) for t in lengths]


def packer(enforce_sorted: bool) -> Callable[[list[Tensor]], PackedSequence]:
    """Packs a list of sequences."""
    return lambda xs: pack_sequence(xs, enforce_sorted=enforce_sorted)
