"""Cells of one's own beside the loop that one would write: the same step, called time after time.

    python -m bench.cells                                   about six minutes
    python -m bench.cells --cells slstm --threads 1 --shapes 128,16,128,128 --out runs/bench
    python -m bench.cells --dtypes bf16 --threads 1             on a GPU
    python -m bench.cells --read runs/bench/cpu-cells.jsonl      the table of kept lines

On a CPU or, where there is one, a GPU. The loop is no strawman: it multiplies the input by its
weights for all time steps at once, and calls the cell's step in a Python loop, of which autograd
keeps a record. Forward is a call under no_grad; train is a call and all gradients. Both take turns
in one process, after their results were found to agree; a time is the least of three calls, and the
figures are medians of such times. A ratio above 1: fused_rnn is faster.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_rnn
from bench import records, timing
from bench.cases import DTYPES
from bench.records import Line
from bench.report import markdown
from fused_rnn.cells import leaky_rnn, peephole_lstm, slstm
from fused_rnn.examples.common import default_device, device, integer, number, require
from fused_rnn.spec.cells import Cell

MODES = ("train", "forward")
LOOP, US = "loop", "fused_rnn"
BEST_OF = 3  # calls, of which the fastest one counts as a sample
# Relative to the norm. A loop of 16-bit tensors rounds each of its operations, our kernels only h:
# found were 2.5e-3 and 1.5e-2 at 128 steps.
TOLERANCES = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 4e-2}


@fused_rnn.cell(gates="ifgo", states="hc")
def plain_lstm(gates: Any, state: Any) -> tuple[Tensor, Tensor]:
    """An LSTM as a user would write it: torch.nn's own kernels do not know it."""
    i, f, o = torch.sigmoid(gates.i), torch.sigmoid(gates.f), torch.sigmoid(gates.o)
    c = f * state.c + i * torch.tanh(gates.g)
    return o * torch.tanh(c), c


CELLS: dict[str, Cell] = {
    "plain_lstm": plain_lstm,
    "slstm": slstm,
    "peephole_lstm": peephole_lstm,
    "leaky_rnn": leaky_rnn,
}


class Shape(NamedTuple):
    """Sizes of a layer's call."""

    T: int
    B: int
    I: int
    H: int


SHAPES = (
    Shape(128, 16, 128, 128),
    Shape(32, 8, 64, 64),
    Shape(512, 4, 64, 64),
    Shape(64, 16, 256, 256),
    Shape(64, 128, 128, 128),
)


def shape(text: str) -> Shape:
    """A command-line type: T,B,I,H."""
    sizes = [integer(1)(part) for part in text.split(",")]
    if len(sizes) != 4:
        raise argparse.ArgumentTypeError(f"T,B,I,H, not {text}")
    return Shape(*sizes)


def loop(layer: fused_rnn.FusedRecurrent, x: Tensor) -> Tensor:
    """What the layer computes, as one would write it: h of all steps [T, B, H]."""
    weights, cell = dict(layer.named_parameters()), layer.cell
    gx = F.linear(x, weights["weight_ih_l0"], weights["bias_ih_l0"])
    states = [x.new_full((x.shape[1], layer.hidden_size), value) for value in cell.initial]
    own = [weights[f"{name}_l0"] for name in cell.parameters]
    outputs = []
    for t in range(len(x)):
        gates = gx[t] + F.linear(states[0], weights["weight_hh_l0"], weights["bias_hh_l0"])
        states = list(cell.call(gates.chunk(cell.blocks, -1), states, own))
        outputs.append(states[0])
    return torch.stack(outputs)


def contenders(
    name: str, size: Shape, dtype: str, mode: str, where: torch.device
) -> dict[str, timing.Run]:
    """What is timed.

    Raises:
        RuntimeError: their results differ by more than roundings.
    """
    torch.manual_seed(0)
    how: Any = {"device": where, "dtype": DTYPES[dtype]}
    layer = fused_rnn.FusedRecurrent(CELLS[name], size.I, size.H, **how)
    x = torch.randn(size.T, size.B, size.I, **how, requires_grad=True)
    wanted = [x, *layer.parameters()]
    grad = torch.randn(size.T, size.B, size.H, **how)
    calls: dict[str, Callable[[], Tensor]] = {LOOP: lambda: loop(layer, x), US: lambda: layer(x)[0]}

    def training(call: Callable[[], Tensor]) -> timing.Run:
        return lambda: torch.autograd.grad(call(), wanted, grad)

    def inference(call: Callable[[], Tensor]) -> timing.Run:
        def run() -> tuple[Tensor]:
            with torch.no_grad():
                return (call(),)

        return run

    runs = {who: (training if mode == "train" else inference)(call) for who, call in calls.items()}
    theirs, ours = (run() for run in runs.values())
    for a, b in zip(theirs, ours, strict=True):  # type: ignore[call-overload]
        if not (a - b).norm() <= TOLERANCES[dtype] * b.norm():  # nor if it is not a number
            difference = (a - b).norm() / b.norm()
            raise RuntimeError(f"{name} {dtype} {size}: results differ by {difference:.1e}")
    return runs


def fastest(run: timing.Run) -> list[float]:
    """One sample: the least time of some calls."""
    once = timing.cuda_events if torch.cuda.is_available() else timing.clock
    return [min(once(run)[0] for _ in range(BEST_OF))]


def lines_of(
    name: str,
    size: Shape,
    dtype: str,
    mode: str,
    machine: records.Machine,
    args: argparse.Namespace,
) -> Iterator[Line]:
    """Two lines: the loop's, and ours."""
    runs = contenders(name, size, dtype, mode, args.device)
    for who, times in timing.interleaved(runs, args.seconds, fastest).items():
        yield Line(
            machine=machine,
            shapes="cells",
            cell=name,
            dtype=dtype,
            **size._asdict(),
            heads=1,
            bidirectional=False,
            packed=False,
            mode=mode,
            provider=who,
            detail=f"least of {BEST_OF}",
            timer=timing.timer(args.device)[0],
            ms=times.median,
            p20=times.p20,
            p80=times.p80,
            samples=times.samples,
            ratio=times.ratio,
            baseline=LOOP,
        )


def table(lines: Sequence[Line]) -> str:
    """A row for each cell and shape, with the ratios of all modes and numbers of threads."""
    by_row: dict[tuple[str, str, str], dict[tuple[int, str], dict[str, Line]]] = {}
    for line in lines:
        row = by_row.setdefault((line.cell, line.dtype, line.where), {})
        row.setdefault((line.machine.threads, line.mode), {})[line.provider] = line
    columns = sorted({key for row in by_row.values() for key in row}, key=lambda k: (k[0], k[1]))
    head = ["cell", "type", "T, B, I, H"]
    for threads, mode in columns:
        head += [f"{mode}, {threads} thread{'s' * (threads > 1)}: loop ms", "fused ms", "ratio"]
    rows = []
    for (cell, dtype, where), row in by_row.items():
        entries = [cell, dtype, where]
        for key in columns:
            pair = row.get(key)
            if pair is None:
                entries += ["", "", ""]
                continue
            entries += [f"{pair[LOOP].ms:.1f}", f"{pair[US].ms:.1f}", f"{pair[US].ratio:.1f}"]
        rows.append(entries)
    return markdown(head, rows)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m bench.cells", description=__doc__)
    made.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    made.add_argument("--dtypes", nargs="+", choices=TOLERANCES, default=["fp32"])
    made.add_argument("--shapes", nargs="+", type=shape, metavar="T,B,I,H", default=list(SHAPES))
    made.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    made.add_argument("--threads", nargs="+", type=integer(1), default=[1, 2])
    made.add_argument("--seconds", type=number(0), default=2.0, help="of a row (%(default)s)")
    made.add_argument("--device", type=device, default=default_device())
    made.add_argument("--out", type=Path, help="a folder for the lines")
    made.add_argument("--read", nargs="+", type=Path, metavar="FILE", help="measure nothing")
    return made


def measured(args: argparse.Namespace) -> list[Line]:
    """The lines of all that there is to measure; kept in ``args.out`` if it is cut off."""
    from tqdm import tqdm

    lines, machines = list[Line](), dict[int, records.Machine]()
    before, quiet = torch.get_num_threads(), not sys.stderr.isatty()
    work = itertools.product(args.threads, args.cells, args.dtypes, args.shapes, args.modes)
    try:
        for threads, name, dtype, size, mode in tqdm(list(work), unit="row", disable=quiet):
            torch.set_num_threads(threads)
            if threads not in machines:
                machines[threads] = records.machine(args.device)
            lines += lines_of(name, size, dtype, mode, machines[threads], args)
            if args.out:
                list(records.save(lines, args.out))
    finally:
        torch.set_num_threads(before)
    return lines


def main(argv: list[str] | None = None) -> int:
    """Measure, or read, and print the table."""
    args = parser().parse_args(argv)
    if not args.read:
        require("tqdm")
    lines = records.read(args.read) if args.read else measured(args)
    where = dict.fromkeys((m.device_name, m.torch, m.commit) for m in (x.machine for x in lines))
    print("\n".join(f"{name}; torch {torch_}; commit {commit}" for name, torch_, commit in where))
    print(table(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
