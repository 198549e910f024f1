"""The zoo: every cell's sweeps, derived for each engine, against its step in the eager loop."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from helpers import assert_close, packer, sequences
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from fused_rnn import FusedRecurrent, cell, cells, explain, surrogate
from fused_rnn.cells import builtin

ZOO = [name for name in cells.__all__ if name not in vars(builtin)]
SMOOTH = [name for name in ZOO if name != "lif"]  # a surrogate is not the derivative of a spike
FOUR = ["slstm", "peephole_lstm", "minimal_gated_unit", "lif"]  # states, parameters, parts apart
every_cell = pytest.mark.parametrize("name", ZOO)
I = 3


def make(
    name: str, H: int = 5, seed: int = 3, dtype: torch.dtype = torch.float64, **kw: Any
) -> Any:
    """A layer, the same one for the same seed."""
    torch.manual_seed(seed)
    layer = FusedRecurrent(getattr(cells, name), I, H, dtype=dtype, **kw)
    with torch.no_grad():  # away from their first values, which may be the same for all units
        for own in layer.cell.parameters:
            for n, p in layer.named_parameters():
                if n.startswith(own):
                    p.add_(torch.randn_like(p) / 2)
    return layer


def initial(layer: Any, *batch: int) -> tuple[Tensor, ...]:
    """Random states; sLSTM divides by n, which is positive."""
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    made = [torch.randn(rows, *batch, layer.hidden_size) for _ in layer.cell.states]
    positive = [s == "n" for s in layer.cell.states]
    made = [s.abs() + 0.5 if p else s for s, p in zip(made, positive, strict=True)]
    return tuple([s.to(layer.weight_ih_l0.dtype) for s in made])


def results(layer: Any, x: Any, hx: Any = None, seed: int = 5, **keywords: Any) -> list[Tensor]:
    """Outputs, and of a fixed random loss the gradients of all inputs and parameters."""
    torch.manual_seed(seed)  # of the masks of zoneout and dropout
    data = x.data if isinstance(x, PackedSequence) else x
    data = data.detach().clone().requires_grad_()
    x = x._replace(data=data) if isinstance(x, PackedSequence) else data
    hx = None if hx is None else [h.detach().clone().requires_grad_() for h in hx]
    given = None if hx is None else hx[0] if len(hx) == 1 else tuple(hx)
    output, final, *others = layer(x, given, **keywords)
    output = output.data if isinstance(output, PackedSequence) else output
    found = [output, *((final,) if isinstance(final, Tensor) else final), *sum(others, ())]
    generator = torch.Generator().manual_seed(7)
    loss = torch.zeros((), dtype=torch.float64, device=data.device)
    for t in found:
        weight = torch.randn(t.shape, generator=generator, dtype=torch.float64)
        loss = loss + (t.double() * weight.to(t.device)).sum()
    wanted = [data, *(hx or ()), *layer.parameters()]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    return [t.detach() for t in (*found, *grads)]


def assert_all_close(found: list[Tensor], expected: list[Tensor], **how: Any) -> None:
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert_close(a.cpu(), b, f"result {i}", **how)


def against_eager(name: str, x: Any, with_states: bool, keywords: Any = None, **kw: Any) -> None:
    keywords = keywords or {}
    found = []
    for backend in ("cpu", "eager"):
        layer = make(name, backend=backend, **kw)
        B = x.batch_sizes[0].item() if isinstance(x, PackedSequence) else x.shape[1]
        hx = initial(layer, B) if with_states else None
        found.append(results(layer, x, hx, **keywords))
    assert_all_close(*found)


# ---- the cells ----------------------------------------------------------------------------------


def test_names() -> None:
    assert {*cells.__all__} <= {*dir(cells)}
    assert cells.GRU is builtin.GRU
    with pytest.raises(AttributeError, match=r"module fused_rnn.cells has no attribute lstn"):
        cells.lstn  # type: ignore[attr-defined]  # noqa: B018
    for name in ZOO:
        zoo: Any = getattr(cells, name)
        assert zoo.name == name
        assert zoo.no_kernels is None
        assert "\n\n" in zoo.step.__doc__


@every_cell
def test_explain_names_the_engine(name: str) -> None:
    assert explain(make(name), torch.randn(4, 2, I).double())[0].backend == "cpu"
    layer = make(name, dtype=torch.float32)
    assert explain(layer, torch.randn(4, 2, I), 90)[0].backend == "triton"


def test_slstm_does_not_overflow() -> None:
    """Gates of any size, in fp32: exp(i) of 200 is not a number there, and exp(-200) is 0."""
    layer = make("slstm", dtype=torch.float32)
    for scale in (-2000.0, 2000.0):
        with torch.no_grad():
            for p in layer.parameters():
                p.fill_(scale / 10)
        assert all(torch.isfinite(t).all() for t in results(layer, torch.ones(4, 2, I)))


def test_slstm_is_an_average() -> None:
    """What the stabiliser stands for: c and n are sums of the exponential gates."""
    layer = make("slstm")
    x = torch.randn(4, 2, I, dtype=torch.float64)
    with torch.no_grad():
        layer.weight_hh_l0.zero_()
        gates = x @ layer.weight_ih_l0.T + layer.bias_ih_l0 + layer.bias_hh_l0
    i, f, z, o = gates.chunk(4, -1)
    c = n = torch.zeros_like(i[0])
    for t in range(4):
        f_t = torch.sigmoid(f[t])
        c, n = f_t * c + torch.exp(i[t]) * torch.tanh(z[t]), f_t * n + torch.exp(i[t])
    torch.testing.assert_close(layer(x)[0][-1], torch.sigmoid(o[-1]) * c / n)


# ---- derivatives --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("name", SMOOTH)
def test_gradcheck(name: str, backend: str) -> None:
    layer = make(name, H=2, backend=backend)
    parameters = {n: p.detach() for n, p in layer.named_parameters()}
    lengths = torch.tensor([3, 1])

    def call(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        own = dict(zip(parameters, rest, strict=False))
        hx = rest[len(own) :]
        given = hx[0] if len(hx) == 1 else hx
        output, final = functional_call(layer, own, (x, given), {"lengths": lengths})
        return output, *((final,) if isinstance(final, Tensor) else final)

    x = torch.randn(3, 2, I, dtype=torch.float64)
    inputs = [x, *parameters.values(), *initial(layer, 2)]
    inputs = [t.clone().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


class Spike(torch.autograd.Function):
    """A surrogate gradient as it is written elsewhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dspike: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return dspike / (1 + 10 * x.abs()) ** 2


@cell(gates="a", states="hv")
def spiking(gates: Any, state: Any) -> Any:
    v = 0.9 * state.v + gates.a - state.h
    return Spike.apply(v - 1.0), v


@pytest.mark.parametrize("backend", ["cpu", "eager", "triton"])
def test_a_function_of_ones_own_as_a_surrogate(backend: str, triton_device: str) -> None:
    """It computes what `surrogate` does: the fast sigmoid's derivative is 1 / (1 + 10 |x|)^2."""
    device = triton_device if backend == "triton" else "cpu"
    dtype = torch.float32 if backend == "triton" else torch.float64
    expected = make("lif", backend="eager")
    torch.manual_seed(3)
    mine = FusedRecurrent(spiking, I, 5, backend=backend, dtype=dtype)  # type: ignore[arg-type]
    mine.load_state_dict(expected.state_dict())
    x = 3 * torch.randn(6, 2, I)
    exact = results(expected, x.double())
    assert 0 < exact[0].sum() < exact[0].numel()  # some spikes
    assert_all_close(results(mine.to(device), x.to(device, dtype)), exact, growth=4)


def test_surrogate_without_a_slope() -> None:
    """Where `smooth` is constant, nothing flows back."""
    x = torch.ones(2, 3, requires_grad=True)
    y = surrogate(x.round(), 0 * x)
    assert torch.equal(y, x)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.zeros(2, 3))


# ---- the CPU's sweeps ---------------------------------------------------------------------------

CASES: dict[str, tuple[dict[str, Any], bool]] = {  # of the constructor, and initial states
    "uniform": ({}, True),
    "no biases": ({"bias": False}, False),
    "stack": ({"num_layers": 2, "bidirectional": True}, True),
    "recompute": ({"recompute": True, "bidirectional": True}, True),
    "heads": ({"heads": 2, "H": 6, "num_layers": 2}, True),
    "heads, recompute": ({"heads": 3, "H": 6, "recompute": True}, False),
    "learned states": ({"learn_h0": True}, False),
}


@pytest.mark.parametrize("case", CASES)
@every_cell
def test_sweeps(name: str, case: str) -> None:
    options, with_states = CASES[case]
    against_eager(name, 2 * torch.randn(7, 3, I).double(), with_states, **options)


@every_cell
def test_sweeps_of_packed_input(name: str) -> None:
    xs = sequences([2, 5, 1, 4], I, torch.float64)
    for recompute in (False, True):
        against_eager(name, packer(False)(xs), True, bidirectional=True, recompute=recompute)


@every_cell
def test_segments(name: str) -> None:
    x, lengths = torch.randn(6, 4, I).double(), torch.tensor([6, 0, 3, 5])
    reset = torch.rand(6, 4) < 0.3
    keywords = {"lengths": lengths, "reset": reset}
    against_eager(name, x, True, keywords, bidirectional=True)
    against_eager(name, x, False, keywords, num_layers=2, learn_h0=True)


@every_cell
def test_options_have_one_seed(name: str) -> None:
    """Zoneout and the like run in the eager loop on a CPU: "auto" draws what it draws."""
    options = {"zoneout": 0.3, "recurrent_dropout": 0.4, "clip_recurrent_grad": 0.1}
    x = torch.randn(5, 3, I).double()
    keywords = {"return_state_sequences": True}
    layers = [
        make(name, backend=b, learn_h0=True, bidirectional=True, **options)  # type: ignore[arg-type]
        for b in ("auto", "eager")
    ]
    for training in (True, False):
        found = [results(layer.train(training), x, **keywords) for layer in layers]
        assert_all_close(*found)


# ---- the kernels --------------------------------------------------------------------------------

KERNEL_CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({}, True),
    "recompute": ({"recompute": True, "bidirectional": True, "heads": 2}, False),
    "options": (
        {"zoneout": 0.3, "recurrent_dropout": 0.4, "clip_recurrent_grad": 0.3, "learn_h0": True},
        False,
    ),
}


@pytest.fixture
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_rnn.engines.triton.support.rnn_precision", lambda: "ieee")


# Where a tile has no unit, cells may divide by zero: the interpreter tells, no result shows it.
@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning")
@pytest.mark.usefixtures("_full_precision")
@pytest.mark.parametrize("case", KERNEL_CASES)
@every_cell
def test_kernels(name: str, case: str, triton_device: str) -> None:
    options, with_states = KERNEL_CASES[case]
    exact = make(name, H=6, backend="eager", **options)
    layer = make(name, H=6, backend="triton", **options).to(triton_device, torch.float32)
    exact.load_state_dict({n: t.double() for n, t in layer.state_dict().items()})
    x, hx = 2 * torch.randn(3, 2, I), None
    keywords: dict[str, Any] = {}
    if case == "options":
        keywords = {
            "lengths": torch.tensor([3, 2]),
            "reset": torch.tensor([[0, 0], [0, 1], [1, 0]]).bool(),
            "return_state_sequences": True,
        }
        # Masks are drawn per device and type, so the expectation stands in for them.
        exact.eval()
        layer.eval()
    if with_states:
        hx = [h.float() for h in initial(exact, 2)]
    expected = results(exact, x.double(), hx and [h.double() for h in hx], **keywords)
    moved = {k: v.to(triton_device) if isinstance(v, Tensor) else v for k, v in keywords.items()}
    found = results(layer, x.to(triton_device), hx and [h.to(triton_device) for h in hx], **moved)
    assert_all_close(found, expected, growth=4)


# ---- PyTorch ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo looks at it
@pytest.mark.parametrize("name", ["slstm", pytest.param("peephole_lstm", marks=pytest.mark.slow)])
def test_compile(name: str) -> None:
    layer = make(name, num_layers=2)
    compiled = torch.compile(make(name, num_layers=2), fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 2, I).double()
    assert_all_close(results(compiled, x), results(layer, x))
    torch.compiler.reset()


def test_export() -> None:
    layer = make("peephole_lstm", bidirectional=True).eval()
    program = torch.export.export(layer, (torch.randn(5, 2, I).double(),), strict=False)
    x = torch.randn(5, 2, I).double()
    for found, expected in zip(program.module()(x), layer(x), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", FOUR)
def test_func(name: str) -> None:
    layer = make(name)
    xs = torch.randn(2, 4, 3, I).double()
    expected = torch.stack([layer(x)[0] for x in xs])
    torch.testing.assert_close(vmap(lambda x: layer(x)[0])(xs), expected)
    parameters = {n: p.detach() for n, p in layer.named_parameters()}

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        output: Tensor = functional_call(layer, p, (x,))[0]
        return output.square().sum()

    found = grad(loss)(parameters, xs[0])
    grads = torch.autograd.grad(layer(xs[0])[0].square().sum(), list(layer.parameters()))
    for (n, g), e in zip(found.items(), grads, strict=True):
        torch.testing.assert_close(g, e, msg=n)
    per_sample = vmap(grad(loss), (None, 0))(parameters, xs)
    torch.testing.assert_close(per_sample["weight_hh_l0"][0], found["weight_hh_l0"])


@every_cell
def test_autocast(name: str) -> None:
    """It rounds operands to bf16, 8 bits, and neither output nor gradients are far off."""
    exact, layer = make(name, num_layers=2), make(name, num_layers=2, dtype=torch.float32)
    layer.load_state_dict(exact.state_dict())
    x = torch.randn(5, 2, I)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(layer, x)
    assert found[0].dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in layer.parameters())
    assert all(torch.isfinite(t).all() for t in found)
    if name != "lif":  # a rounding may move a spike
        torch.testing.assert_close(found[0].double(), exact(x.double())[0], rtol=0.05, atol=0.05)


# ---- copies -------------------------------------------------------------------------------------


def copies(layer: Any) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    empty = FusedRecurrent(layer.cell, I, 5, learn_h0=True, dtype=torch.float64)
    empty.load_state_dict(layer.state_dict())
    return {
        "deepcopy": copy.deepcopy(layer),
        "pickle": pickle.loads(pickle.dumps(layer)),
        "torch.save": torch.load(file, weights_only=False),
        "state_dict": empty,
    }


@every_cell
def test_copies(name: str) -> None:
    layer = make(name, learn_h0=True)
    x = torch.randn(4, 2, I).double()
    for how, other in copies(layer).items():
        assert other.cell is layer.cell, how
        assert torch.equal(other(x)[0], layer(x)[0]), how
    assert pickle.loads(pickle.dumps(layer.cell)) is layer.cell


# ---- an antisymmetric recurrence ----------------------------------------------------------------


class Antisymmetric(nn.Module):
    """M - M^T of a matrix M."""

    def forward(self, M: Tensor) -> Tensor:
        return M - M.T


def test_antisymmetric_weights() -> None:
    """As the paper has them: the parametrization is trained, and all engines see what it makes."""
    found = []
    for backend in ("cpu", "eager"):
        layer = make("antisymmetric_rnn", backend=backend)
        parametrize.register_parametrization(layer, "weight_hh_l0", Antisymmetric())
        assert torch.equal(layer.weight_hh_l0, -layer.weight_hh_l0.T)
        found.append(results(layer, torch.ones(6, 2, I).double()))
    assert_all_close(*found)
