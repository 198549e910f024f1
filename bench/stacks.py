"""Stacks whose layers overlap in time, beside the same layers one after the other and torch.nn's.

    python -m bench.stacks --model                          what the planner reckons with; no GPU
    python -m bench.stacks --out runs/bench                 on a GPU, two minutes
    python -m bench.stacks --layers 4 --hidden 512 --batch 8 --steps 1024
    python -m bench.stacks --read bench/results/nvidia-h200-stacks.jsonl    the table of kept lines

Called, and replayed from a CUDA graph, in which the host does not count. All take turns in one
process. Forward is a call under no_grad; train is a call and all gradients.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

import fused_rnn
from bench import records, timing
from bench.cases import DTYPES, LAYERS, Case
from bench.providers import Fused
from bench.records import Line
from bench.report import markdown
from bench.roofline import kernel_cell
from fused_rnn.examples.common import default_device, device, integer, number
from fused_rnn.kernels.chips import LIMITS
from fused_rnn.kernels.pieces import FORWARD_SHARE, cut_stack, stack_us
from fused_rnn.kernels.plan import PlanRequest
from fused_rnn.kernels.planner import make_plan
from fused_rnn.ops import functional

THEM, APART, US = "torch.nn", "fused_rnn, layer by layer", "fused_rnn"
GRAPH = " in a CUDA graph"
MODES = ("forward", "train")
H100 = LIMITS[90]
# Of the norm of a result, between two ways to compute it: deep stacks and long ones included.
AGREE = {"bf16": 5e-2, "fp16": 1e-2, "tf32": 1e-2, "fp32": 1e-3}


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """All combinations of sizes."""
    sizes = itertools.product(args.layers, args.hidden, args.batch, args.steps)
    for layers, H, B, T in sizes:
        yield Case(args.cell, args.dtype, T, B, H, H, layers=layers)


def calls_of(case: Case, mode: str, where: torch.device) -> dict[str, timing.Run]:
    """What is timed, by who runs it; results have been seen to agree."""
    torch.manual_seed(0)
    plain = case.layer(where)
    ours = fused_rnn.fuse(plain, backend="auto")
    x = case.input(where)
    assert isinstance(x, Tensor)
    dout = torch.randn(case.T, case.B, case.H, device=where, dtype=case.torch_dtype)

    def call(layer: nn.Module) -> list[Tensor]:
        if mode == "forward":
            with torch.no_grad():
                return [layer(x)[0]]
        out = layer(x)[0]
        return [out.detach(), *torch.autograd.grad(out, [x, *layer.parameters()], dout)]

    def apart() -> list[Tensor]:
        with mock.patch.object(functional, "overlaps", return_value=False):
            return call(ours)

    runs: dict[str, Callable[[], list[Tensor]]] = {
        THEM: lambda: call(plain),
        APART: apart,
        US: lambda: call(ours),
    }
    first, *others = [run() for run in runs.values()]
    for other in others:
        for a, b in zip(other, first, strict=True):
            if not (a - b).norm() <= AGREE[case.dtype] * b.norm():
                raise RuntimeError(f"{case} {mode}: results differ")
    return {**runs, APART + GRAPH: recorded(apart), US + GRAPH: recorded(runs[US])}


def recorded(run: Callable[[], object]) -> timing.Run:
    """A replay of a call."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def clock(run: timing.Run) -> list[float]:
    """A call until the GPU is done, from one at which it is idle: the host counts."""

    def call() -> None:
        run()
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    return timing.clock(call)


def lines_of(
    case: Case, mode: str, machine: records.Machine, args: argparse.Namespace
) -> Iterator[Line]:
    """A line for each contender."""
    runs = calls_of(case, mode, args.device)
    with torch.set_grad_enabled(mode == "train"):
        detail = Fused().detail(case, args.device)
    times = timing.interleaved(runs, args.seconds, clock, args.turns)
    for who, measured in times.items():
        yield Line(
            machine=machine,
            shapes="stacks",
            **vars(case),
            mode=mode,
            provider=who,
            detail=detail if who.startswith(US) else "",
            timer="time.perf_counter",
            ms=measured.median,
            p20=measured.p20,
            p80=measured.p80,
            samples=measured.samples,
            ratio=measured.ratio,
            baseline=THEM,
        )


def table(lines: Sequence[Line]) -> str:
    """A row for each case and mode: milliseconds, and how many times as fast as layer by layer."""
    rows: dict[tuple[int, int, int, int, str], dict[str, float]] = {}
    for line in lines:
        key = line.layers, line.H, line.B, line.T, line.mode
        rows.setdefault(key, {})[line.provider] = line.ms
    head = ["layers", "H", "B", "T", "mode", "torch.nn ms", "layer by layer ms", "overlapping ms"]
    head += ["ratio", "in a graph: layer by layer ms", "overlapping ms", "ratio"]
    body = []
    for key, ms in rows.items():
        row = [*map(str, key), f"{ms[THEM]:.2f}"]
        for kind in ("", GRAPH):
            apart, ours = ms[APART + kind], ms[US + kind]
            row += [f"{apart:.2f}", f"{ours:.2f}", f"{apart / ours:.2f}"]
        body.append(row)
    return markdown(head, body)


def model(args: argparse.Namespace) -> str:
    """The same sizes as the planner reckons with them, for an H100 in a CUDA graph."""
    head = ["layers", "H", "B", "T", "at a time", "forward: pieces", "ms", "ratio"]
    head += ["reverse: pieces", "ms", "ratio"]
    body = []
    for case in cases(args):
        request = PlanRequest(kernel_cell(case), case.H, case.torch_dtype, case.B, 1)
        plan = make_plan(request, H100)
        cuts = cut_stack(request, plan, case.layers, case.T, H100, captured=True)
        row = [str(n) for n in (case.layers, case.H, case.B, case.T, cuts.forward.streams)]
        for cut, share in zip(cuts, (FORWARD_SHARE, 1 - FORWARD_SHARE), strict=True):
            assert cut is not None
            step = share * plan.step_us
            us = stack_us(case.layers, case.T, cut.pieces, cut.streams, step)
            alone = case.layers * case.T * step
            row += [str(cut.pieces), f"{us / 1000:.2f}", f"{alone / us:.2f}"]
        body.append(row)
    return markdown(head, body)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m bench.stacks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--cell", choices=LAYERS, default="lstm")
    made.add_argument("--dtype", choices=DTYPES, default="bf16")
    sizes = {"layers": (2, 4, 8), "hidden": (128, 256, 512), "batch": (8, 32), "steps": (256, 1024)}
    for name, default in sizes.items():
        made.add_argument(f"--{name}", nargs="+", type=integer(1), default=list(default))
    made.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    made.add_argument("--seconds", type=number(0), default=0.0, help="at least, for a case")
    made.add_argument("--turns", type=integer(1), default=3, help="of all contenders, at least")
    made.add_argument("--device", type=device, default=default_device())
    made.add_argument("--out", type=Path, help="folder for the lines of JSON")
    made.add_argument("--model", action="store_true", help="print the model, measure nothing")
    made.add_argument("--read", type=Path, help="print the table of these lines, measure nothing")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or print what is known."""
    args = parser().parse_args(arguments)
    if args.model:
        print(model(args))
        return
    if args.read:
        print(table(records.read([args.read])))
        return
    if args.device.type != "cuda":
        sys.exit("streams and CUDA graphs need a GPU; --model needs none")
    machine = records.machine(args.device)
    lines: list[Line] = []
    for case, mode in itertools.product(cases(args), args.modes):
        lines += lines_of(case, mode, machine, args)
        if args.out:  # kept if it is cut off
            list(records.save(lines, args.out))
    print(table(lines))


if __name__ == "__main__":
    main()
