"""Training step and forward pass on the CPU, ours and torch.nn's, interleaved in one process.

python -m bench.cpu prints milliseconds (median) and the ratio torch.nn / fused_rnn: above 1 means
that fused_rnn is faster. Bytes saved for backward are counted with saved-tensor hooks.
"""

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fused_rnn

SHAPES = [
    (128, 16, 64, 64),
    (128, 32, 128, 128),
    (256, 32, 256, 256),
    (128, 16, 512, 512),
    (512, 1, 256, 256),
]
CELLS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class Row:
    """One line of the table; times in milliseconds, bytes saved for backward in MiB."""

    cell: str
    T: int
    B: int
    I: int
    H: int
    dtype: str
    mode: str
    torch_ms: float
    fused_ms: float
    ratio: float
    torch_mib: float
    fused_mib: float


def saved_bytes(forward: Callable[[], Tensor], parameters: set[int]) -> int:
    """Bytes of the distinct storages that ``forward`` saves for backward, parameters aside."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()  # alive while counting, so that no storage is counted twice
    total = sum(storages.values())
    del kept
    return total


def interleaved(
    theirs: Callable[[], object], ours: Callable[[], object], seconds: float
) -> tuple[float, float, float]:
    """Median milliseconds of both, taking turns for about ``seconds``, and the median ratio.

    The ratio is taken within each turn, so that a machine that slows down for a while (a laptop,
    a shared host) slows both of its halves. Who goes first alternates.
    """
    for _ in range(2):  # the first calls allocate and warm up
        theirs()
        ours()
    times: list[list[float]] = [[], []]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 6:
        order = (0, 1) if len(times[0]) % 2 else (1, 0)
        for which in order:
            start = time.perf_counter()
            (theirs, ours)[which]()
            times[which].append(1e3 * (time.perf_counter() - start))
    ratio = statistics.median(a / b for a, b in zip(*times, strict=True))
    return statistics.median(times[0]), statistics.median(times[1]), ratio


def measure(
    cell: str, shape: tuple[int, int, int, int], dtype: str, backend: str, seconds: float
) -> list[Row]:
    """The training row and the forward row of one cell and shape."""
    T, B, I, H = shape
    theirs = CELLS[cell](I, H, dtype=DTYPES[dtype])
    ours = fused_rnn.fuse(CELLS[cell](I, H, dtype=DTYPES[dtype]), backend=backend)  # type: ignore[arg-type]
    x = torch.randn(T, B, I, dtype=DTYPES[dtype], requires_grad=True)
    dout = torch.randn(T, B, H, dtype=DTYPES[dtype])

    def train(layer: nn.Module) -> Callable[[], object]:
        wanted = [x, *layer.parameters()]
        return lambda: torch.autograd.grad(layer(x)[0], wanted, dout)

    def forward(layer: nn.Module) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return layer(x)

        return run

    mib = []
    for layer in (theirs, ours):
        own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
        mib.append(saved_bytes(lambda: layer(x)[0], own) / 2**20)  # noqa: B023
    rows = []
    for mode, make in (("train", train), ("forward", forward)):
        times = interleaved(make(theirs), make(ours), seconds)
        rows.append(Row(cell, T, B, I, H, dtype, mode, *times, *mib))
    return rows


def geometric_mean(values: list[float]) -> float:
    """The geometric mean."""
    return math.exp(statistics.fmean(map(math.log, values)))


def table(rows: list[Row]) -> str:
    """A Markdown table of the rows, with the geometric mean of each cell and mode."""
    lines = [
        "| cell | T, B, I, H | torch train ms | ours | ratio | torch forward ms | ours | ratio "
        "| saved MiB torch | ours |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for train, forward in zip(rows[::2], rows[1::2], strict=True):
        shape = f"{train.T}, {train.B}, {train.I}, {train.H}"
        lines.append(
            f"| {train.cell} | {shape} | {train.torch_ms:.1f} | {train.fused_ms:.1f} "
            f"| {train.ratio:.2f} | {forward.torch_ms:.1f} | {forward.fused_ms:.1f} "
            f"| {forward.ratio:.2f} | {train.torch_mib:.1f} | {train.fused_mib:.1f} |"
        )
    for cell in dict.fromkeys(row.cell for row in rows):
        means = [
            geometric_mean([r.ratio for r in rows if r.cell == cell and r.mode == mode])
            for mode in ("train", "forward")
        ]
        lines.append(f"| {cell} | geometric mean | | | {means[0]:.2f} | | | {means[1]:.2f} | | |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=__doc__)
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument(
        "--shapes", nargs="+", metavar="T,B,I,H", help="default: the five shapes of the README"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--backend", default="auto", help="fused_rnn's backend")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each row")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args(argv)
    shapes = SHAPES
    if args.shapes:
        shapes = [tuple(map(int, s.split(","))) for s in args.shapes]  # type: ignore[misc]
        if any(len(s) != 4 or min(s) < 1 for s in shapes):
            parser.error(f"--shapes takes four positive integers T,B,I,H each, got {args.shapes}")

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows: list[Row] = []
    work = [(cell, shape) for cell in args.cells for shape in shapes]
    for cell, shape in tqdm(work, unit="shape", disable=not sys.stderr.isatty()):
        rows += measure(cell, shape, args.dtype, args.backend, args.seconds)
    print(
        f"torch {torch.__version__}, {platform.machine()}, "
        f"{torch.backends.cpu.get_cpu_capability()}, {args.threads} threads, {args.dtype}"
    )
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
