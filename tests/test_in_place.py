"""What a training loop writes into the results of a call: final states set to zero."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_same, every_backend, every_layer, packer, tensors, twins
from torch import Tensor, nn

import fused_rnn

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "stack": {"num_layers": 2},
    "bidirectional": {"bidirectional": True},
    "both": {"num_layers": 2, "bidirectional": True},
}
every_shape = pytest.mark.parametrize("shape", SHAPES)
every_input = pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])


def two_pieces(layer: nn.Module, x: Any, x2: Any) -> list[Tensor]:
    """A rollout in two pieces: some sequences are done after the first."""
    done = torch.tensor([True, False, True], device=layer.weight_ih_l0.device)
    first = tensors(layer(x))
    states = first[1:]
    for i, state in enumerate(states):
        state[:, done] = 0.25 * i
        state.mul_(0.5)
    second = tensors(layer(x2, tuple(states) if len(states) == 2 else states[0]))
    for state in second[1:]:
        state[:, ~done] = 0
    return [*first, *second]


def gradients(
    layer: nn.Module,
    call: Callable[..., list[Tensor]],
    packed: bool,
    steps: int,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Everything of :func:`two_pieces`, and the gradients of inputs and parameters."""
    generator = torch.Generator().manual_seed(3)
    dtype = layer.weight_ih_l0.dtype
    if packed:
        lengths, make = [max(1, steps - b) for b in (1, 0, 2)], packer(False)
    else:
        lengths, make = [steps] * 3, lambda xs: torch.stack(xs, 1)  # type: ignore[return-value]
    xs = [
        torch.randn(t, 4, dtype=dtype, generator=generator).to(device).requires_grad_()
        for t in lengths * 2
    ]
    found = call(layer, make(xs[:3]), make(xs[3:]))
    weights = [torch.randn(t.shape, generator=generator, dtype=dtype).to(device) for t in found]
    loss = torch.stack([(w * t).sum() for w, t in zip(weights, found, strict=True)]).sum()
    grads = torch.autograd.grad(loss, [*xs, *layer.parameters()])
    return {str(i): t.detach().cpu() for i, t in enumerate([*found, *grads])}


@every_layer
@every_backend
@every_shape
@every_input
@pytest.mark.parametrize("steps", [4, 1])
def test_final_states_may_be_overwritten(
    kind: str, backend: Any, shape: str, packed: bool, steps: int
) -> None:
    plain, fused = twins(kind, 4, 5, backend=backend, dtype=torch.float64, **SHAPES[shape])
    expected = gradients(plain, two_pieces, packed, steps)
    assert_same(gradients(fused, two_pieces, packed, steps), expected)


@pytest.mark.parametrize("shape", ["plain", "both"])
@pytest.mark.parametrize("steps", [4, 1])
def test_final_states_of_onednn(shape: str, steps: int) -> None:
    plain, fused = twins("lstm", 4, 5, backend="native", **SHAPES[shape])
    expected = gradients(plain, two_pieces, False, steps)
    assert_same(gradients(fused, two_pieces, False, steps), expected)


@pytest.mark.parametrize(
    "kind", ["tanh", pytest.param("relu", marks=pytest.mark.slow), "gru", "lstm"]
)
@every_input
def test_final_states_of_the_kernels(kind: str, packed: bool, triton_device: str) -> None:
    plain, fused = twins(kind, 4, 5, backend="triton", bidirectional=True)
    expected = gradients(plain, two_pieces, packed, 2)
    fused = fused.to(triton_device)
    assert_same(gradients(fused, two_pieces, packed, 2, triton_device), expected)


@every_layer
@pytest.mark.parametrize("keyword", ["lengths", "reset", "zoneout", "recompute"])
def test_final_states_of_calls_that_torch_lacks(kind: str, keyword: str) -> None:
    """Every path of a call, against the same call whose states are written into as copies."""
    _, layer = twins(kind, 4, 5, dtype=torch.float64)
    how: dict[str, Any] = {}
    if keyword == "lengths":
        how["lengths"] = torch.tensor([2, 4, 0])
    elif keyword == "reset":
        how["reset"] = torch.rand(4, 3) < 0.5
    else:
        setattr(layer.eval(), keyword, 0.25 if keyword == "zoneout" else True)
    x = torch.randn(4, 3, 4, dtype=torch.float64, requires_grad=True)
    results = []
    for copied in (False, True):
        found = tensors(layer(x, **how))
        states = [s.clone() if copied else s for s in found[1:]]
        for state in states:
            state[:, 1] = 0
        loss = torch.stack([t.square().sum() for t in (found[0], *states)]).sum()
        grads = torch.autograd.grad(loss, [x, *layer.parameters()])
        results.append({str(i): g for i, g in enumerate(grads)})
    assert_same(*results)


def test_all_cell_states_may_be_overwritten(triton_device: str) -> None:
    layer = fused_rnn.FusedLSTM(4, 5, backend="triton").to(triton_device)
    x = torch.randn(4, 3, 4, device=triton_device)
    results = []
    for copied in (False, True):
        output, _, cells = layer(x, return_cell_sequence=True)
        cells = cells.clone() if copied else cells
        cells[:2] = 0
        loss = output.square().sum() + cells.square().sum()
        grads = torch.autograd.grad(loss, list(layer.parameters()))
        results.append({str(i): g for i, g in enumerate(grads)})
    assert_same(*results)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("kind", [pytest.param("tanh", marks=pytest.mark.slow), "gru", "projected"])
@pytest.mark.parametrize("how", ["compile", "export"])
def test_final_states_of_a_traced_layer(kind: str, how: str) -> None:
    plain, fused = twins(kind, 4, 5, 2, dtype=torch.float64)
    expected = gradients(plain, two_pieces, False, 4)
    torch._dynamo.reset()
    if how == "compile":
        call = torch.compile(two_pieces, fullgraph=True, backend="aot_eager")
        assert_same(gradients(fused, call, False, 4), expected)
    else:
        hx = tuple(torch.zeros(2, 3, s, dtype=torch.float64) for s in _widths(fused))
        example = torch.zeros(4, 3, 4, dtype=torch.float64), hx if len(hx) == 2 else hx[0]
        module = torch.export.export(fused, example).module()

        def run(layer: nn.Module, x: Tensor, x2: Tensor) -> list[Tensor]:
            def called(x: Tensor, hx: Any = example[1]) -> Any:
                return module(x, hx)

            called.weight_ih_l0 = layer.weight_ih_l0  # type: ignore[attr-defined]
            return two_pieces(called, x, x2)  # type: ignore[arg-type]

        named = dict(module.named_parameters())
        fused.parameters = lambda: [named[n] for n, _ in plain.named_parameters()]  # type: ignore[method-assign]
        assert_same(gradients(fused, run, False, 4), expected)
    torch._dynamo.reset()


def _widths(layer: nn.Module) -> list[int]:
    widths = [layer.proj_size or layer.hidden_size]
    return [*widths, layer.hidden_size] if layer.mode == "LSTM" else widths


def test_the_output_is_read_by_backward() -> None:
    """docs/faq.md says so: PyTorch's own error, not a wrong gradient."""
    layer = fused_rnn.FusedGRU(4, 5, backend="cpu")
    output, _ = layer(torch.randn(4, 3, 4))
    output.mul_(2)
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
        output.sum().backward()
