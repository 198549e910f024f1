"""What is timed: a cell, a type, sizes and a mode, and the named sets of such cases."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

MODES = ("forward", "train", "sweep", "sweep_train")
# Names as in bench.static: fp32 multiplies in full precision, tf32 is fp32 with TF32 products.
DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
LAYERS: dict[str, tuple[Callable[..., nn.RNNBase], dict[str, Any]]] = {
    "rnn_tanh": (nn.RNN, {}),
    "rnn_relu": (nn.RNN, {"nonlinearity": "relu"}),
    "gru": (nn.GRU, {}),
    "lstm": (nn.LSTM, {}),
}
CELLS = ("rnn_tanh", "gru", "lstm")


@dataclass(frozen=True)
class Case:
    """One layer and its input.

    Attributes:
        cell: a key of `LAYERS`.
        dtype: a key of `DTYPES`.
        T: time steps.
        B: sequences.
        I: input size.
        H: hidden units, of one head.
        heads: independent recurrences side by side (a block-diagonal weight matrix); only the
            modes without the input's product know more than one.
        bidirectional: two directions.
        packed: lengths are drawn from 1 to T, instead of T for all.
        layers: layers on top of each other; the rooflines and the kernels' bytes know one.
    """

    cell: str
    dtype: str
    T: int
    B: int
    I: int
    H: int
    heads: int = 1
    bidirectional: bool = False
    packed: bool = False
    layers: int = 1

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def __str__(self) -> str:
        text = f"{self.cell} {self.dtype} T={self.T} B={self.B} I={self.I} H={self.H}"
        text += f" heads={self.heads}" if self.heads > 1 else ""
        text += f" layers={self.layers}" if self.layers > 1 else ""
        return text + " bidirectional" * self.bidirectional + " packed" * self.packed

    def layer(self, device: torch.device) -> nn.RNNBase:
        """torch.nn's layer, whose parameters all providers take over."""
        kind, extra = LAYERS[self.cell]
        how = extra | {"bidirectional": self.bidirectional, "num_layers": self.layers}
        return kind(self.I, self.H, device=device, dtype=self.torch_dtype, **how)

    def input(self, device: torch.device) -> Tensor | PackedSequence:
        """Random numbers of the input's shape; a gradient may be asked for."""
        x = torch.randn(self.T, self.B, self.I, device=device, dtype=self.torch_dtype)
        x.requires_grad_()
        if not self.packed:
            return x
        lengths = 1 + torch.randperm(self.T).repeat(-(-self.B // self.T))[: self.B]
        lengths[0] = self.T
        return pack_padded_sequence(x, lengths.sort(descending=True).values)


@dataclass(frozen=True)
class Shapes:
    """A named set of cases, what it is there to show, and in which modes."""

    why: str
    make: Callable[[], Iterable[Case]]
    modes: tuple[str, ...] = ("train", "forward")


@contextmanager
def products(dtype: str) -> Iterator[None]:
    """Let fp32 products of everybody be what the name of a type says; needs PyTorch 2.9."""
    value = "tf32" if dtype == "tf32" else "ieee"
    holders: tuple[Any, ...] = (torch.backends.cudnn.rnn, torch.backends.cuda.matmul)
    before = [holder.fp32_precision for holder in holders]
    for holder in holders:
        holder.fp32_precision = value
    try:
        yield
    finally:
        for holder, old in zip(holders, before, strict=True):
            holder.fp32_precision = old


def _cpu() -> Iterable[Case]:
    sizes = ((128, 16, 64), (128, 32, 128), (256, 32, 256), (128, 16, 512), (512, 1, 256))
    return (Case(cell, "fp32", T, B, H, H) for cell in CELLS for T, B, H in sizes)


def _flashrnn_heads() -> Iterable[Case]:
    sizes = (16, 32, 64, 128, 256, 768)
    return (Case("lstm", "bf16", 1024, 16, H, H, heads=768 // H) for H in sizes)


def _uncovered() -> Iterable[Case]:
    sizes = (256, 512, 1024, 1536)
    dense = [Case(c, d, 512, 32, H, H) for c in CELLS for d in ("bf16", "tf32") for H in sizes]
    options: list[dict[str, bool]] = [{"bidirectional": True}, {"packed": True}]
    more = itertools.product(("gru", "lstm"), ("bf16", "fp16"), options)
    return dense + [Case(c, d, 512, 32, 512, 512, **o) for c, d, o in more]


def _batch() -> Iterable[Case]:
    sizes = itertools.product(("gru", "lstm"), (128, 512), (2**n for n in range(10)))
    return (Case(cell, "bf16", 256, B, H, H) for cell, H, B in sizes)


def _grid() -> Iterable[Case]:
    sizes = (64, 128, 256, 512, 1024, 2048)
    yield from (Case(cell, "bf16", 256, 32, H, H) for cell in ("lstm", "gru") for H in sizes)
    yield from (Case("rnn_tanh", "bf16", 256, 32, H, H) for H in (64, 256, 1024))
    yield from (Case("lstm", "fp16", 256, 32, H, H) for H in (64, 128, 256, 512, 1024))
    yield from (Case("lstm", "tf32", 256, 32, H, H) for H in (64, 128, 512, 1024))
    yield from (Case("lstm", "fp32", 256, 32, H, H) for H in (64, 256))
    batches = itertools.product(("bf16", "fp16"), (128, 512), (1, 8, 128, 512))
    yield from (Case("lstm", dtype, 256, B, H, H) for dtype, H, B in batches)
    yield from (Case("lstm", "fp16", T, 32, 128, 128) for T in (32, 1024))


SETS = {
    "grid": Shapes(
        "docs/speed.md's GPU table: every type, H from 64 to 2048, B from 1 to 512", _grid
    ),
    "tiny": Shapes(
        "small enough for a test",
        lambda: (Case(cell, "fp32", 4, 2, 3, 5) for cell in CELLS),
    ),
    "cpu": Shapes("the CPU table of docs/speed.md", _cpu),
    "flashrnn": Shapes(
        "FlashRNN's published figure, dense: LSTM, batch 16, 1024 steps, 768 units in one head",
        lambda: (Case("lstm", dtype, 1024, 16, 768, 768) for dtype in ("bf16", "fp16")),
        MODES,
    ),
    "flashrnn-heads": Shapes(
        "the same figure in heads of 16 units and more, without the input's product",
        _flashrnn_heads,
        ("sweep_train", "sweep"),
    ),
    "cudnn": Shapes(
        "cuDNN's persistent kernel: fp16, H a multiple of 128, one direction, where it is best",
        lambda: (Case("lstm", "fp16", 512, 32, H, H) for H in (128, 256, 512, 768, 1024)),
    ),
    "uncovered": Shapes(
        "what that kernel does not cover: bf16, TF32, GRU, two directions, packed",
        _uncovered,
    ),
    "batch": Shapes("batches from 1 to 512", _batch),
}
GPU_SETS = ("grid", "flashrnn", "flashrnn-heads", "cudnn", "uncovered", "batch")


def parse_shape(text: str) -> tuple[int, int, int, int]:
    """A command-line type: T,B,I,H."""
    sizes = tuple(map(int, text.split(",")))
    if len(sizes) != 4 or min(sizes) < 1:
        raise ValueError(f"four positive integers T,B,I,H are needed, got {text}")
    return sizes
