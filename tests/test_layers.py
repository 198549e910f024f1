"""The layers as modules: construction, state dicts, copies, errors, fuse and unfuse."""

import copy
import io
import pickle
import re
import warnings
from typing import Any

import pytest
import torch
from helpers import LAYERS, every_layer, tensors, twins
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import fused_rnn
from fused_rnn import FusedGRU, FusedLSTM, FusedRNN, fuse, unfuse

ARGUMENTS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((3, 5), {}),
    ((3, 5, 2), {"bias": False}),
    ((3, 5, 2), {"batch_first": True, "dropout": 0.25, "bidirectional": True}),
    ((3, 5), {"dtype": torch.float64}),
]


@every_layer
@pytest.mark.parametrize(("args", "kwargs"), ARGUMENTS)
def test_parameters_initialisation_and_repr(
    kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    theirs, ours, extra = LAYERS[kind]
    torch.manual_seed(5)
    plain = theirs(*args, **kwargs, **extra)
    torch.manual_seed(5)
    fused = ours(*args, **kwargs, **extra)
    expected = dict(plain.named_parameters())
    found = dict(fused.named_parameters())
    assert list(found) == list(expected)
    for name, value in found.items():
        assert torch.equal(value, expected[name])
        assert value.dtype == expected[name].dtype
    assert repr(fused) == repr(plain).replace(theirs.__name__, ours.__name__)
    assert [[p.shape for p in ps] for ps in fused.all_weights] == [
        [p.shape for p in ps] for ps in plain.all_weights
    ]
    fused.flatten_parameters()


def test_backend_in_repr() -> None:
    assert repr(FusedGRU(1, 2, backend="eager")) == "FusedGRU(1, 2, backend='eager')"


def test_positional_nonlinearity() -> None:
    assert FusedRNN(3, 5, 1, "relu").nonlinearity == nn.RNN(3, 5, 1, "relu").nonlinearity == "relu"


def test_recompute_argument() -> None:
    assert repr(FusedGRU(1, 2, recompute=True)) == "FusedGRU(1, 2, recompute=True)"
    with pytest.raises(TypeError, match="recompute should be of type bool, got: int"):
        FusedGRU(1, 2, recompute=1)  # type: ignore[arg-type]


def test_device_argument() -> None:
    assert FusedLSTM(3, 5, device="meta").weight_ih_l0.device.type == "meta"


@every_layer
def test_state_dict_loads_both_ways(kind: str) -> None:
    theirs, ours, extra = LAYERS[kind]
    plain, fused = theirs(3, 5, 2, **extra), ours(3, 5, 2, **extra)
    x = torch.randn(4, 2, 3)
    fused.load_state_dict(plain.state_dict())
    torch.testing.assert_close(fused(x), plain(x))
    fused.reset_parameters()
    plain.load_state_dict(fused.state_dict())
    torch.testing.assert_close(fused(x), plain(x))


@every_layer
def test_copies(kind: str) -> None:
    _, layer = twins(kind, 3, 5, bidirectional=True, backend="eager")
    x = torch.randn(4, 2, 3)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ]
    for twin in copies:
        assert twin.backend == "eager"
        assert all(
            torch.equal(a, b) and a is not b
            for a, b in zip(twin.parameters(), layer.parameters(), strict=True)
        )
        for found, expected in zip(tensors(twin(x)), tensors(layer(x)), strict=True):
            assert torch.equal(found, expected)


def test_pickle_of_an_older_version() -> None:
    layer = FusedLSTM(3, 5)
    state = layer.__getstate__()
    for name in ("proj_size", "backend", "recompute", "_entries", "_sizes"):
        state = {k: v for k, v in state.items() if k != name}
    state |= {"_layout": [], "_order": ()}  # which it had
    restored = FusedLSTM.__new__(FusedLSTM)
    restored.__setstate__(state)
    x = torch.randn(4, 2, 3)
    assert torch.equal(restored(x)[0], layer(x)[0])
    assert vars(restored).keys() == vars(layer).keys()
    assert fused_rnn.layers.FusedLSTM is FusedLSTM  # where it was pickled from


@every_layer
def test_types_follow_the_input(kind: str) -> None:
    plain, fused = twins(kind, 3, 5, bidirectional=True)
    packed = pack_sequence([torch.randn(t, 3) for t in (1, 4, 2)], enforce_sorted=False)
    found, expected = fused(packed), plain(packed)
    assert type(found[0]) is type(expected[0])
    for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        assert torch.equal(getattr(found[0], name), getattr(expected[0], name))
    assert type(found[1]) is type(expected[1])


# ---- errors -------------------------------------------------------------------------------------

BAD_CONSTRUCTORS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((0, 5), {}),
    ((3, 0), {}),
    ((3, 5, 0), {}),
    ((3, -5), {}),
    ((3.0, 5), {}),
    ((3, 5.0), {}),
    ((3, 5), {"bias": 1}),
    ((3, 5), {"batch_first": "yes"}),
    ((3, 5), {"dropout": 1.5}),
    ((3, 5), {"dropout": -0.1}),
    ((3, 5), {"dropout": True}),
    ((3, 5), {"dropout": "half"}),
    ((3, 5), {"proj_size": -1}),
    ((3, 5), {"proj_size": 5}),
    ((3, 5), {"nonlinearity": "sine"}),
]


@pytest.mark.parametrize(("args", "kwargs"), BAD_CONSTRUCTORS)
@pytest.mark.parametrize("kind", ["tanh", "gru", "lstm"])
def test_constructor_errors_are_torchs(
    kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    theirs, ours, _ = LAYERS[kind]
    with pytest.raises((TypeError, ValueError)) as expected:
        theirs(*args, **kwargs)
    with pytest.raises(expected.type) as found:
        ours(*args, **kwargs)
    if "nonlinearity" not in kwargs or kind == "tanh":  # else Python's own, with the class's name
        assert str(found.value) == str(expected.value)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="Unknown backend 'cuda'"):
        FusedGRU(3, 5, backend="cuda")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["tanh", "gru", "lstm"])
def test_dropout_warning_is_torchs(kind: str) -> None:
    theirs, ours, _ = LAYERS[kind]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs(3, 5, dropout=0.5)
        ours(3, 5, dropout=0.5)
    expected, found = caught
    assert str(found.message) == str(expected.message)
    assert found.filename == __file__


def _state(kind: str, *shape: int, dtype: torch.dtype = torch.float32) -> Any:
    h = torch.zeros(shape, dtype=dtype)
    return (h, h) if kind == "lstm" else h


BAD_CALLS = {
    "4-D input": lambda kind: (torch.randn(1, 2, 3, 4), None),
    "0-D input": lambda kind: (torch.tensor(1.0), None),
    "1-D input": lambda kind: (torch.randn(3), None),
    "wrong input size": lambda kind: (torch.randn(4, 2, 9), None),
    "wrong dtype": lambda kind: (torch.randn(4, 2, 3, dtype=torch.float64), None),
    "no steps": lambda kind: (torch.randn(0, 2, 3), None),
    "state of another batch": lambda kind: (torch.randn(4, 2, 3), _state(kind, 1, 7, 5)),
    "state of another size": lambda kind: (torch.randn(4, 2, 3), _state(kind, 1, 2, 6)),
    "state of two layers": lambda kind: (torch.randn(4, 2, 3), _state(kind, 2, 2, 5)),
    "2-D state": lambda kind: (torch.randn(4, 2, 3), _state(kind, 2, 5)),
    "3-D state, unbatched": lambda kind: (torch.randn(4, 3), _state(kind, 1, 1, 5)),
    "packed, wrong input size": lambda kind: (pack_sequence([torch.randn(4, 9)]), None),
    "packed, wrong state": lambda kind: (
        pack_sequence([torch.randn(4, 3)]),
        _state(kind, 1, 2, 5),
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
@pytest.mark.parametrize("kind", ["tanh", "gru", "lstm"])
def test_call_errors_are_torchs(kind: str, case: str) -> None:
    plain, fused = twins(kind, 3, 5)
    if kind == "lstm" and case.startswith("packed"):
        plain, _ = twins("gru", 3, 5)  # nn.LSTM does not check these
    with pytest.raises((RuntimeError, ValueError)) as expected:
        plain(*BAD_CALLS[case]("gru" if isinstance(plain, nn.GRU) else kind))
    message = str(expected.value)
    if isinstance(plain, nn.GRU) and kind == "lstm":
        message = message.replace("hidden size", "hidden[0] size")
    with pytest.raises(expected.type, match=re.escape(message)):
        fused(*BAD_CALLS[case](kind))


@pytest.mark.parametrize("kind", ["tanh", "gru", "lstm"])
def test_state_of_another_type_or_device(kind: str) -> None:
    _, fused = twins(kind, 3, 5)
    message = "Input and hidden tensors are not the same dtype, found input tensor with"
    with pytest.raises(RuntimeError, match=message):
        fused(torch.randn(4, 2, 3), _state(kind, 1, 2, 5, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="found input tensor at meta and parameter tensor at"):
        fused(torch.randn(4, 2, 3, device="meta"))
    meta = torch.zeros(1, 2, 5, device="meta")
    with pytest.raises(RuntimeError, match="found input tensor at cpu and hidden tensor at meta"):
        fused(torch.randn(4, 2, 3), (meta, meta) if kind == "lstm" else meta)


# ---- dispatch -----------------------------------------------------------------------------------


def test_cpu_is_refused_elsewhere() -> None:
    layer = FusedGRU(3, 5, backend="cpu", device="meta")
    with pytest.raises(RuntimeError, match="needs tensors on the CPU, but the input is on meta"):
        layer(torch.randn(4, 2, 3, device="meta"))


def test_auto_runs_eager_elsewhere() -> None:
    output, h_n = FusedGRU(3, 5, device="meta")(torch.randn(4, 2, 3, device="meta"))
    assert output.shape == (4, 2, 5)
    assert h_n.shape == (1, 2, 5)


# ---- fuse and unfuse ----------------------------------------------------------------------------


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(3, 6, 2, bidirectional=True, dropout=0.1, proj_size=2)
        self.stack = nn.ModuleDict({"a": nn.GRU(4, 5, batch_first=True), "b": nn.ReLU()})
        self.relu = nn.RNN(5, 4, nonlinearity="relu", bias=False)
        self.again = self.stack["a"]  # one layer in two places

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stack["a"](self.encoder(x)[0])[0]
        output: torch.Tensor = self.relu(self.stack["b"](x))[0]
        return output


def test_fuse_and_unfuse_a_nested_model() -> None:
    model = Nested().eval()
    model.encoder.train()
    x = torch.randn(4, 2, 3)
    parameters = dict(model.named_parameters())
    calls: list[str] = []
    model.relu.register_forward_hook(lambda *_: calls.append("hook"))
    model.encoder.note = "kept"  # type: ignore[assignment]
    model.encoder.eval()
    expected = model(x)

    assert fuse(model) is model
    assert isinstance(model.encoder, FusedLSTM)
    assert isinstance(model.stack["a"], FusedGRU)
    assert isinstance(model.relu, FusedRNN)
    assert model.again is model.stack["a"]
    assert model.encoder.note == "kept"  # type: ignore[comparison-overlap]
    assert not model.training
    torch.testing.assert_close(model(x), expected)
    assert all(p is parameters[name] for name, p in model.named_parameters())

    assert unfuse(model) is model
    assert type(model.encoder) is nn.LSTM
    assert type(model.relu) is nn.RNN
    assert model.again is model.stack["a"]
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert calls == ["hook"] * 3
    model.double()  # torch.nn's layers still know their weights
    model(x.double())


@every_layer
def test_fuse_a_layer_itself(kind: str) -> None:
    theirs, ours, extra = LAYERS[kind]
    plain = theirs(3, 5, **extra)
    fused = fuse(plain, backend="eager")
    assert type(fused) is ours
    assert fused.backend == "eager"
    back = unfuse(fused)
    assert type(back) is theirs
    assert repr(back) == repr(plain)
    x = torch.randn(4, 2, 3)
    assert torch.equal(back(x)[0], plain(x)[0])


def test_fuse_shares_parameters_with_an_optimizer() -> None:
    model = nn.Sequential(nn.GRU(3, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fuse(model)
    before = model[0].weight_hh_l0.detach().clone()
    model(torch.randn(4, 2, 3))[0].sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight_hh_l0, before)


def test_fuse_leaves_subclasses_alone() -> None:
    class Own(nn.LSTM):
        pass

    model = nn.Sequential(Own(3, 5))
    with pytest.warns(UserWarning, match="Own '0' is a subclass of a recurrent layer"):
        fuse(model)
    assert type(model[0]) is Own


def test_replaced_parameters_are_seen() -> None:
    """Nothing is cached past a change, however a parameter is changed."""
    layer = FusedGRU(3, 5)
    x = torch.randn(4, 2, 3)
    first = layer(x)[0]
    layer.weight_hh_l0 = nn.Parameter(torch.zeros(15, 5))
    second = layer(x)[0]
    assert not torch.equal(first, second)
    with torch.no_grad():
        layer.weight_hh_l0.add_(1)
    assert not torch.equal(layer(x)[0], second)


def test_public_names() -> None:
    assert fused_rnn.__all__ == [
        "FusedGRU",
        "FusedLSTM",
        "FusedRNN",
        "FusedRecurrent",
        "Tracer",
        "__version__",
        "cell",
        "explain",
        "fuse",
        "show",
        "surrogate",
        "tune",
        "unfuse",
    ]
