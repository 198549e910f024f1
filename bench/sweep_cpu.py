"""torch.nn's time over ours on a CPU, over random ordinary cases: a distribution, no chosen shapes.

    python -m bench.sweep_cpu                       about ten minutes
    python -m bench.sweep_cpu --seed 1 --threads 2 --out runs/sweep --plot runs/sweep/sweep.png
    python -m bench.sweep_cpu --null                torch.nn beside itself: what noise looks like
    python -m bench.sweep_cpu --read runs/sweep     the tables of kept lines, nothing is measured

Cases are drawn by a seed: the cell, the type (fp32 most often), T from 1 to 64, B from 1 to 32, I
and H from 16 to 256 (their logarithms uniform), packed or not, one or two layers, one or two
directions. The shapes of docs/speed.md are a second group. Forward is a call under no_grad, train a
call and all gradients. Both layers take turns in one process, after their results were found to
agree. A ratio above 1: fused_rnn is faster. Single steps (T = 1) stand apart.
"""

import argparse
import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from bench import records, report
from bench.cases import LAYERS, SETS, Case, products
from bench.providers import Fused, TorchNN
from bench.records import Line
from bench.report import NAMES, markdown
from bench.run import measure
from bench.timing import Run, geometric_mean
from fused_rnn.examples.common import integer, number, require

CPU = torch.device("cpu")
GROUPS = ("random", "cpu")  # the second one is bench.run's set of that name
MODES = ("forward", "train")
SHARES = {"fp32": 0.6, "bf16": 0.2, "fp64": 0.1, "fp16": 0.1}  # of the types among random cases
PACKED, TWO_LAYERS, TWO_DIRECTIONS = 1 / 3, 1 / 4, 1 / 4  # shares, too
# RMS of a difference over RMS of torch.nn's result: some ten times what roundings make of it. Of a
# ReLU's gradients the square root: a rounding may move a unit across zero, and a share of units as
# large as a rounding loses or gains its gradient as a whole.
TOLERANCE = {"fp64": 1e-12, "fp32": 1e-5, "bf16": 1e-1, "fp16": 1e-2}
QUANTILES = {"least": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95}
WORST = 10
TICKS = [2.0**n for n in range(-10, 11)]  # of the histograms
AGAIN = "torch.nn, again"


class WrongResult(RuntimeError):
    """A contender computes something else than torch.nn, so that its time is worth nothing."""


# What is measured


def random_cases(count: int, seed: int, dtypes: Sequence[str] = tuple(SHARES)) -> list[Case]:
    """Ordinary cases, the same ones for the same seed; fewer of them are the first of more."""
    draw = random.Random(seed)

    def size(low: int, high: int) -> int:
        return min(high, int(low * ((high + 1) / low) ** draw.random()))

    return [
        Case(
            cell=draw.choice(list(LAYERS)),
            dtype=draw.choices(dtypes, [SHARES[dtype] for dtype in dtypes])[0],
            T=size(1, 64),
            B=size(1, 32),
            I=size(16, 256),
            H=size(16, 256),
            packed=draw.random() < PACKED,
            layers=1 + (draw.random() < TWO_LAYERS),
            bidirectional=draw.random() < TWO_DIRECTIONS,
        )
        for _ in range(count)
    ]


def agree(case: Case, outputs: Mapping[str, Tensor], runs: Mapping[str, Run]) -> None:
    """Compare what all contenders compute with what the first one does.

    Args:
        case: what they run.
        outputs: of a call that records gradients.
        runs: what is timed; they return outputs or gradients.

    Raises:
        WrongResult: they differ by more than roundings, or are not finite.
    """
    results = {name: _tensors(outputs[name], run()) for name, run in runs.items()}
    (first, expected), *others = results.items()
    for name, mine in others:
        for i, (a, b) in enumerate(zip(mine, expected, strict=True)):
            off, size = float((a - b).norm()), float(b.norm())
            # The first one is the output, and of two that are left the second one is it again.
            kinks = case.cell == "rnn_relu" and i > 0 and len(mine) > 2
            tolerance = TOLERANCE[case.dtype] ** (0.5 if kinks else 1)
            if not off <= tolerance * size:  # nor if it is not a number
                what = f"result {i} of {name} for {case}"
                raise WrongResult(f"{what} is off by {off:.1e}, where {first}'s norm is {size:.1e}")


def _tensors(output: Tensor, result: object) -> list[Tensor]:
    """All that a contender computes, in fp64."""
    results = result if isinstance(result, tuple) else (result,)
    return [t.detach().double() for t in (output, *results)]


def _fail(name: str, reason: str, case: Case) -> None:
    raise RuntimeError(f"{name} cannot run {case}: {reason}")


def lines_of(
    group: str, case: Case, mode: str, machine: records.Machine, args: argparse.Namespace
) -> Iterator[Line]:
    """Two lines: torch.nn's, and the other contender's.

    Raises:
        RuntimeError: a contender fails.
        WrongResult: it computes something else.
    """
    other = TorchNN() if args.null else Fused()
    other.name = AGAIN if args.null else other.name
    seed = args.seed if group == "random" else None
    with products(case.dtype):
        for line in measure(
            group, case, mode, [TorchNN(), other], machine, args.seconds, _fail, check=agree
        ):
            yield replace(line, seed=seed)


# What is told


@dataclass(frozen=True)
class Pair:
    """Two lines of one case, mode and number of threads."""

    theirs: Line
    ours: Line

    @property
    def column(self) -> str:
        """Mode and threads."""
        threads = self.ours.machine.threads
        return f"{self.ours.mode}, {threads} thread{'s' * (threads > 1)}"

    @property
    def step(self) -> bool:
        """Whether it is a single step."""
        return self.ours.T == 1


def pairs(lines: Sequence[Line]) -> list[Pair]:
    """Every two lines.

    Raises:
        ValueError: they are not of one case, torch.nn's first, as `python -m bench.sweep_cpu`
            writes them.
    """
    both = [Pair(*two) for two in zip(lines[::2], lines[1::2], strict=False)]
    keys = [[(x.machine, x.shapes, x.where, x.mode) for x in (p.theirs, p.ours)] for p in both]
    alike = all(a == b for a, b in keys) and all(
        p.theirs.provider == p.ours.baseline != p.ours.provider for p in both
    )
    if len(lines) % 2 or not alike:
        raise ValueError("lines do not come in pairs, torch.nn's and another's of one case")
    return both


def distribution(all_pairs: Sequence[Pair]) -> str:
    """How ratios are spread, by group, sequences and single steps apart, by mode and threads."""
    columns = list(dict.fromkeys(pair.column for pair in all_pairs))
    rows = []
    for group in dict.fromkeys(pair.ours.shapes for pair in all_pairs):
        for step, name in ((False, "sequences"), (True, "single steps")):
            mine = [p for p in all_pairs if (p.ours.shapes, p.step) == (group, step)]
            for column in ["all", *columns] if len(columns) > 1 else columns:
                chosen = [p.ours.ratio for p in mine if column in ("all", p.column)]
                if chosen:
                    rows.append([group, name, column, *_spread(chosen)])
    head = ["cases", "", "mode", "number", "below 0.9", "below 0.95", "1 or more", "geometric mean"]
    return markdown([*head, *QUANTILES, "most"], rows)


def _spread(ratios: Sequence[float]) -> list[str]:
    shares = (
        sum(r < 0.9 for r in ratios) / len(ratios),
        sum(r < 0.95 for r in ratios) / len(ratios),
        sum(r >= 1 for r in ratios) / len(ratios),
    )
    at = torch.tensor([*QUANTILES.values(), 1.0], dtype=torch.float64)
    quantiles = torch.tensor(ratios, dtype=torch.float64).quantile(at).tolist()
    means = [geometric_mean(list(ratios)), *quantiles]
    return [str(len(ratios)), *(f"{s:.0%}" for s in shares), *(f"{m:.2f}" for m in means)]


def _steps(line: Line) -> str:
    if line.T == 1:
        return "1"
    return "2 to 15" if line.T < 16 else "16 to 64" if line.T <= 64 else "65 and more"


# By what the means are taken: the name, the value of a line, and the order of the values.
SPLITS: dict[str, tuple[Callable[[Line], str], tuple[str, ...]]] = {
    "T": (_steps, ("1", "2 to 15", "16 to 64", "65 and more")),
    "cell": (lambda line: NAMES[line.cell], tuple(NAMES.values())),
    "type": (lambda line: line.dtype, tuple(SHARES)),
    "lengths": (lambda line: "packed" if line.packed else "equal", ("equal", "packed")),
    "layers": (lambda line: str(line.layers), ("1", "2")),
    "directions": (lambda line: "2" if line.bidirectional else "1", ("1", "2")),
}


def means(all_pairs: Sequence[Pair]) -> str:
    """Geometric means by each property; but for the row T = 1, of sequences alone."""
    columns = list(dict.fromkeys(pair.column for pair in all_pairs))
    rows = []
    for name, (value, order) in SPLITS.items():
        for which in order:
            mine = [p for p in all_pairs if value(p.ours) == which and (name == "T" or not p.step)]
            row = []
            for column in ["all", *columns] if len(columns) > 1 else columns:
                chosen = [p.ours.ratio for p in mine if column in ("all", p.column)]
                row.append(f"{geometric_mean(chosen):.2f} ({len(chosen)})" if chosen else "-")
            if mine:
                rows.append([name, which, *row])
    head = ["by", "", *(["all"] if len(columns) > 1 else []), *columns]
    return markdown(head, rows)


def worst(all_pairs: Sequence[Pair]) -> str:
    """Those with the smallest ratios, and what ran."""
    rows = []
    for pair in sorted(all_pairs, key=lambda pair: pair.ours.ratio)[:WORST]:
        line = pair.ours
        sizes = [NAMES[line.cell], line.dtype, line.where, pair.column]
        times = [f"{ms:.3f}" for ms in (pair.theirs.ms, line.ms)]
        rows.append([f"{line.ratio:.2f}", *sizes, *times, line.detail])
    head = ["ratio", "cell", "type", "T, B, I, H", "mode", "torch.nn ms", "ms", "what runs"]
    return markdown(head, rows)


def tables(lines: Sequence[Line]) -> str:
    """All that is told of lines: the distribution, means, the worst.

    Raises:
        ValueError: they do not come in pairs.
    """
    all_pairs = pairs(lines)
    parts = [f"Measured on {report.conditions(lines)}."]
    for who in dict.fromkeys(pair.ours.provider for pair in all_pairs):
        mine = [pair for pair in all_pairs if pair.ours.provider == who]
        parts.append(f"**torch.nn's time over that of {who}**: above 1, the latter is faster.")
        parts.append(distribution(mine))
        for group in dict.fromkeys(pair.ours.shapes for pair in mine):
            parts.append(
                f"Geometric means, {group} cases (how many are in brackets; only the row T = 1 has "
                "single steps):"
            )
            parts.append(means([pair for pair in mine if pair.ours.shapes == group]))
        parts += ["The smallest ratios:", worst(mine)]
    return "\n\n".join(parts)


def _edges(ratios: Sequence[float]) -> list[float]:
    """Bins of equal factors, of which 1 is an edge: who is on its left loses."""
    low, high = math.log(min(0.8, *ratios)), math.log(max(1.25, *ratios))
    width = max(math.log(1.05), (high - low) / 40)
    numbers = range(math.floor(low / width), math.ceil(high / width) + 1)
    return [math.exp(n * width) for n in numbers]


def plot(lines: Sequence[Line], path: Path) -> None:
    """A histogram for each mode and number of threads: of the random cases, if there are any."""
    from matplotlib.figure import Figure

    all_pairs = [pair for pair in pairs(lines) if pair.ours.shapes == "random"] or pairs(lines)
    columns = list(dict.fromkeys(pair.column for pair in all_pairs))
    figure = Figure(figsize=(1 + 3.2 * len(columns), 3.6), layout="constrained")
    axes = figure.subplots(1, len(columns), sharex=True, sharey=True, squeeze=False)[0]
    edges = _edges([pair.ours.ratio for pair in all_pairs])
    ticks = [tick for tick in TICKS if edges[0] <= tick <= edges[-1]]
    for ax, column in zip(axes, columns, strict=True):
        mine = [pair for pair in all_pairs if pair.column == column]
        parts = {
            "sequences": [pair.ours.ratio for pair in mine if not pair.step],
            "single steps": [pair.ours.ratio for pair in mine if pair.step],
        }
        ax.hist(list(parts.values()), edges, stacked=True, label=list(parts))
        ax.axvline(1, color="black", linewidth=1)
        who = mine[0].ours.provider
        ax.set(xscale="log", title=column, xlabel=f"torch.nn's time over that of {who}")
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.set_xticks([], minor=True)
    axes[0].set_ylabel("cases")
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)


# The command


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.sweep_cpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", type=integer(1), default=72, help="random ones (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random cases (%(default)s)")
    parser.add_argument(
        "--groups",
        nargs="+",
        choices=GROUPS,
        default=list(GROUPS),
        help="random cases, the shapes of docs/speed.md (cpu); default: both",
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=SHARES,
        default=list(SHARES),
        help=f"types of the random cases, default: all, as often as {SHARES}",
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="both")
    parser.add_argument(
        "--threads", nargs="+", type=integer(1), default=[1, 2], help="in turn (1 and 2)"
    )
    parser.add_argument(
        "--seconds",
        type=number(0),
        default=0.5,
        help="for each case, mode and number of threads, six turns at least (%(default)s)",
    )
    parser.add_argument("--null", action="store_true", help="time torch.nn beside itself")
    parser.add_argument("--out", type=Path, help="a folder for the lines, one file for each group")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw histograms")
    parser.add_argument(
        "--read", nargs="+", type=Path, metavar="FILE|FOLDER", help="measure nothing, read lines"
    )
    return parser


def plan_work(args: argparse.Namespace) -> list[tuple[int, str, Case, str]]:
    """Threads, the group, a case and a mode, all that there is to measure."""
    groups: dict[str, list[Case]] = {
        "random": random_cases(args.cases, args.seed, list(dict.fromkeys(args.dtypes))),
        "cpu": list(SETS["cpu"].make()),
    }
    return [
        (threads, group, case, mode)
        for threads in dict.fromkeys(args.threads)
        for group in dict.fromkeys(args.groups)
        for case in groups[group]
        for mode in dict.fromkeys(args.modes)
    ]


def main(argv: list[str] | None = None) -> int:
    """Measure, or read."""
    args = parser().parse_args(argv)
    require(*([] if args.read else ["tqdm"]), *(["matplotlib"] if args.plot else []))
    lines = records.read(report.files(args.read)) if args.read else measured(args)
    print(tables(lines))
    if args.plot:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        plot(lines, args.plot)
    return 0


def measured(args: argparse.Namespace) -> list[Line]:
    """The lines of all that there is to measure.

    Raises:
        RuntimeError: a contender fails.
        WrongResult: it computes something else than torch.nn.
    """
    from tqdm import tqdm

    lines, paths, machines = list[Line](), list[Path](), dict[int, records.Machine]()
    before = torch.get_num_threads()
    try:
        quiet = not sys.stderr.isatty()
        for threads, group, case, mode in tqdm(plan_work(args), unit="row", disable=quiet):
            torch.set_num_threads(threads)
            if threads not in machines:
                machines[threads] = records.machine(CPU)
            lines += lines_of(group, case, mode, machines[threads], args)
            paths = list(records.save(lines, args.out)) if args.out else []  # kept if cut off
    finally:
        torch.set_num_threads(before)
    for path in paths:
        print(f"wrote {path}", file=sys.stderr)
    return lines


if __name__ == "__main__":
    sys.exit(main())
