"""Time layers side by side, on the GPU at hand, or on the CPU where there is none.

    python -m bench.run                     every set of shapes for this device
    python -m bench.run --shapes cudnn batch --modes train
    python -m bench.run --shapes 512,16,256,256 --cells gru --dtypes bf16 --out runs/bench
    python -m bench.run --list              what there is

All providers of a case take turns in one process. A GPU is timed by CUDA events
(triton.testing.do_bench: warm-up, L2 flushed before each call), a CPU by the wall clock. Inputs of
layers rotate. Each line of JSON names the device, the driver, the versions and the commit;
`python -m bench.report` makes the tables and plots. Who cannot run a case is skipped, with the
reason.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

from bench import records, report, roofline, timing
from bench.adapter import Provider
from bench.cases import CELLS, DTYPES, GPU_SETS, LAYERS, MODES, SETS, Case, parse_shape, products
from bench.memory import saved_by
from bench.providers import ON_CPU, PROVIDERS
from fused_rnn.engines.triton.devices import device_limits
from fused_rnn.examples.common import default_device, device, require

INPUTS = 3  # that take turns, so that nobody profits from a cache that holds the last one
Skip = Callable[[str, str, Case], None]
# Looks at a case, the outputs and the calls of the contenders, before these are timed.
Check = Callable[[Case, dict[str, torch.Tensor], dict[str, timing.Run]], None]


def contender(
    provider: Provider, case: Case, mode: str, device: torch.device
) -> tuple[timing.Run, torch.Tensor | None, float | None]:
    """What is timed, after one call; its output and the MiB it saves for backward, if it has them.

    Weights and inputs are the same for all contenders of a case.
    """
    torch.manual_seed(0)
    if mode.startswith("sweep"):
        run = provider.sweep(case, device, mode == "sweep_train")
        run()
        return run, None, None
    plain = case.layer(device)
    xs = [provider.input(case.input(device)) for _ in range(INPUTS)]
    module, forward = provider.layer(plain, case)
    outs = [forward(x).detach() for x in xs]  # packed ones have numbers of rows of their own
    turn = itertools.cycle([(x, torch.randn_like(out)) for x, out in zip(xs, outs, strict=True)])

    def infer() -> object:
        with torch.no_grad():
            return forward(next(turn)[0])

    def train() -> object:
        x, dout = next(turn)
        data = x.data if isinstance(x, PackedSequence) else x
        return torch.autograd.grad(forward(x), [data, *module.parameters()], dout)

    saved = saved_by(module, lambda: forward(xs[0])) / 2**20
    return (train if mode == "train" else infer), provider.output(outs[0]), saved


def measure(
    shapes: str,
    case: Case,
    mode: str,
    providers: list[Provider],
    machine: records.Machine,
    seconds: float,
    skip: Skip,
    turns: int = 6,
    check: Check | None = None,
) -> Iterator[records.Line]:
    """The lines of one case in one mode."""
    device, runs = torch.device(machine.device), dict[str, timing.Run]()
    facts, outputs = dict[str, dict[str, Any]](), dict[str, torch.Tensor]()
    for provider in providers:
        if reason := provider.why_not(case, mode, device):
            skip(provider.name, reason, case)
            continue
        try:
            run, out, saved = contender(provider, case, mode, device)
        except Exception as error:  # one contender's failure is not the other ones'
            skip(provider.name, f"FAILED, {type(error).__name__}: {error}".split("\n")[0], case)
            continue
        with torch.set_grad_enabled("train" in mode):  # what runs may depend on it
            fact: dict[str, Any] = {"detail": provider.detail(case, device), "saved_mib": saved}
        if out is not None:
            outputs[provider.name] = out
            if (reference := outputs.get("torch.nn")) is not None:
                fact["difference"] = (out.double() - reference.double()).abs().max().item()
        if device.type == "cuda":
            fact["bounds"] = roofline.bounds(
                case, mode, device_limits(device), provider.plan(case, device)
            )
        runs[provider.name], facts[provider.name] = run, fact
    if not runs:
        return
    if check is not None:
        check(case, outputs, runs)
    name, once = timing.timer(device)
    for provider_name, times in timing.interleaved(runs, seconds, once, turns).items():
        fact = facts[provider_name]
        line = records.Line(
            machine=machine,
            shapes=shapes,
            **asdict(case),
            mode=mode,
            provider=provider_name,
            detail=fact["detail"],
            timer=name,
            ms=times.median,
            p20=times.p20,
            p80=times.p80,
            samples=times.samples,
            ratio=times.ratio,
            baseline=next(iter(runs)),
            difference=fact.get("difference"),
            saved_mib=fact["saved_mib"],
        )
        yield line if "bounds" not in fact else bounded(line, fact["bounds"])


def bounded(line: records.Line, bounds: roofline.Bounds) -> records.Line:
    """The line with its roofline columns."""
    facts = {"limit": bounds.limit, "limit_us": bounds.us}
    return records.Line(**vars(line) | facts | {"fraction": bounds.fraction(line.step_us)})


def plan_work(args: argparse.Namespace) -> list[tuple[str, Case, str]]:
    """All cases in all modes, each with the name of its set."""
    facts = []
    for name in args.shapes:
        if name in SETS:
            cases, modes = list(SETS[name].make()), SETS[name].modes
        else:
            choices = itertools.product(args.cells or CELLS, args.dtypes or ["fp32"])
            cases = [Case(cell, dtype, *parse_shape(name)) for cell, dtype in choices]
            modes = SETS["cpu"].modes
        facts += [
            (name if name in SETS else "own", case, mode)
            for case in cases
            for mode in args.modes or modes
            if not (args.cells and case.cell not in args.cells)
            and not (args.dtypes and case.dtype not in args.dtypes)
        ]
    return facts


def parser() -> argparse.ArgumentParser:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="python -m bench.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=list(GPU_SETS) if gpu else ["cpu"],
        metavar="SET|T,B,I,H",
        help=f"sets ({', '.join(SETS)}) or sizes; default: those for this device",
    )
    parser.add_argument("--cells", nargs="+", choices=LAYERS, help="default: those of the set")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: those of the set")
    parser.add_argument("--modes", nargs="+", choices=MODES, help="default: those of the set")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, help="default: see --list")
    parser.add_argument("--device", type=device, default=default_device(), help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each case and mode")
    parser.add_argument("--turns", type=int, default=6, help="of each contender, at least")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--out", type=Path, help="a folder for the lines, one file for each set")
    parser.add_argument("--list", action="store_true", help="name sets and providers, and end")
    return parser


def print_list() -> None:
    """The sets and the providers."""
    for name, shapes in SETS.items():
        print(f"{name:15} {shapes.why}; {', '.join(shapes.modes)}")
        for case in shapes.make():
            print(f"{'':17}{case}")
    print(f"\non a CPU: {', '.join(ON_CPU)}\non a GPU: {', '.join(PROVIDERS)}")


def main(argv: list[str] | None = None) -> int:
    """Measure; returns 1 if one of our own contenders failed."""
    options = parser()
    args = options.parse_args(argv)
    if args.list:
        print_list()
        return 0
    if str(args.device) not in ("cuda", "cpu"):
        options.error(f"argument --device: cuda or cpu, not {args.device}")
    require("tqdm")
    from tqdm import tqdm

    try:
        work = plan_work(args)
    except ValueError as error:
        options.error(f"--shapes takes names of sets or T,B,I,H: {error}")
    torch.set_num_threads(args.threads)
    names = args.providers or (PROVIDERS if args.device.type == "cuda" else ON_CPU)
    providers = [PROVIDERS[name] for name in names]
    machine = records.machine(args.device)

    skipped: set[tuple[str, str]] = set()

    def skip(name: str, reason: str, case: Case) -> None:
        if (name, reason) not in skipped:
            tqdm.write(f"skipped: {name}: {reason} (first for {case})", file=sys.stderr)
        skipped.add((name, reason))

    lines: list[records.Line] = []
    paths: list[Path] = []
    for shapes, case, mode in tqdm(work, unit="row", disable=not sys.stderr.isatty()):
        with products(case.dtype):
            lines += measure(shapes, case, mode, providers, machine, args.seconds, skip, args.turns)
        paths = list(records.save(lines, args.out)) if args.out else []  # what is cut off is kept
    for path in paths:
        print(f"wrote {path}", file=sys.stderr)
    print(report.tables(lines))
    failed = any(name.startswith("fused_rnn") and "FAILED" in why for name, why in skipped)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
