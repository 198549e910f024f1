"""Markdown tables and plots from the lines of `python -m bench.run`. Nothing is left out.

    python -m bench.report [FILE|FOLDER ...] [--plots docs]

Without arguments it reads what is kept in bench/results. For sets of shapes that no GPU has run,
it prints the command that measures them.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench import records
from bench.cases import GPU_SETS, SETS
from bench.records import Line
from bench.timing import geometric_mean
from fused_rnn.examples.common import require

RESULTS = Path(__file__).parent / "results"
US, THEM = "fused_rnn", "torch.nn"
NAMES = {"rnn_tanh": "RNN", "rnn_relu": "RNN (ReLU)", "gru": "GRU", "lstm": "LSTM"}

Key = tuple[str, str, str, str]


def _key(line: Line) -> Key:
    return line.cell, line.dtype, line.where, line.mode


def _grouped(lines: Iterable[Line]) -> dict[Key, dict[str, Line]]:
    """By case and mode, then by provider; of several measurements the last one."""
    groups: dict[Key, dict[str, Line]] = {}
    for line in lines:
        groups.setdefault(_key(line), {})[line.provider] = line
    return groups


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    body = "\n".join("| " + " | ".join(row) + " |" for row in (head, *rows))
    first, *rest = body.split("\n")
    return "\n".join([first, "|" + "---|" * len(head), *rest])


def pair_table(lines: Sequence[Line]) -> str:
    """Ours beside torch.nn: milliseconds, the ratio turn by turn, MiB saved for backward."""
    groups = _grouped(lines)
    head = ["cell", "T, B, I, H"]
    for mode in ("training", "forward"):
        head += [f"{mode}: torch.nn ms", "ours ms", "ratio"]
    head += ["saved for backward: torch.nn MiB", "ours MiB"]
    rows: list[list[str]] = []
    ratios: dict[str, dict[str, list[float]]] = {}
    for cell, dtype, where in dict.fromkeys(key[:3] for key in groups):
        row, mib = [NAMES[cell], where], ["", ""]
        for mode in ("train", "forward"):
            by_provider = groups.get((cell, dtype, where, mode), {})
            if US not in by_provider or THEM not in by_provider:
                row += ["", "", ""]
                continue
            theirs, ours = by_provider[THEM], by_provider[US]
            row += [f"{theirs.ms:.1f}", f"{ours.ms:.1f}", f"{ours.ratio:.2f}"]
            ratios.setdefault(NAMES[cell], {}).setdefault(mode, []).append(ours.ratio)
            mib = [f"{line.saved_mib:.1f}" for line in (theirs, ours) if line.saved_mib is not None]
        rows.append(row + mib)
    for cell, by_mode in ratios.items():
        means = [
            f"{geometric_mean(by_mode[m]):.2f}" if m in by_mode else ""
            for m in ("train", "forward")
        ]
        rows.append([cell, "geometric mean", "", "", means[0], "", "", means[1], "", ""])
    return markdown(head, rows)


def wide_table(lines: Sequence[Line]) -> str:
    """All providers: microseconds per time step, and how many times as fast as the baseline.

    The last column is what ours achieves of the roofline limit, see `bench.roofline`.
    """
    providers = list(dict.fromkeys(line.provider for line in lines))
    rows = []
    for (cell, dtype, where, mode), by_provider in _grouped(lines).items():
        row = [NAMES[cell], dtype, where, mode]
        for provider in providers:
            line = by_provider.get(provider)
            row.append(f"{line.step_us:.2f} ({line.ratio:.2f})" if line else "-")
        best = [
            line for line in by_provider.values() if line.provider.startswith(US) and line.fraction
        ]
        limit = max(best, key=lambda line: line.fraction or 0.0, default=None)
        row.append(f"{limit.fraction:.0%} of {limit.limit}" if limit else "")
        rows.append(row)
    head = ["cell", "type", "T, B, I, H", "mode", *providers, "ours, of the limit"]
    return markdown(head, rows)


def conditions(lines: Sequence[Line]) -> str:
    """Where and how lines were measured."""
    texts = []
    for m in dict.fromkeys(line.machine for line in lines):
        timers = {line.timer for line in lines if line.machine == m}
        versions = {
            "torch": m.torch,
            "triton": m.triton,
            "CUDA": m.cuda,
            "cuDNN": m.cudnn,
            "driver": m.driver,
            "commit": m.commit,
        }
        text = ", ".join(f"{name} {value}" for name, value in versions.items() if value)
        cpu = f", {m.threads} thread{'s' * (m.threads > 1)}" if m.device == "cpu" else ""
        texts.append(f"{m.device_name}{cpu}; {text}; {', '.join(sorted(timers))}")
    return "; and ".join(texts)


def tables(lines: Sequence[Line]) -> str:
    """A table for each set of shapes and kind of device."""
    parts = []
    for shapes, device in dict.fromkeys((line.shapes, line.machine.device) for line in lines):
        mine = [line for line in lines if (line.shapes, line.machine.device) == (shapes, device)]
        pair = {line.provider for line in mine} <= {US, THEM} and device == "cpu"
        why = SETS[shapes].why if shapes in SETS else "own sizes"
        text = "a ratio above 1 means that fused_rnn is faster."
        if not pair:
            text = f"microseconds per time step (in brackets, {mine[0].baseline}'s over it)."
        parts.append(f"**{shapes}**: {why}. Measured on {conditions(mine)}. Medians; {text}")
        parts.append(pair_table(mine) if pair else wide_table(mine))
    return "\n\n".join(parts)


def missing(lines: Iterable[Line]) -> str:
    """What no GPU has run, and how to run it."""
    done = {line.shapes for line in lines if line.machine.device == "cuda"}
    left = [name for name in GPU_SETS if name not in done]
    rows = [
        f"- {name}: {SETS[name].why}: not measured yet; on a machine with a GPU: "
        f"`python -m bench.run --shapes {name} --out bench/results`"
        for name in left
    ]
    return "\n".join(rows)


def plot(lines: Sequence[Line], path: Path) -> None:
    """Ratios of one set: for each case and mode a bar for every provider but the baseline."""
    from matplotlib.figure import Figure

    modes = list(dict.fromkeys(line.mode for line in lines))
    figure = Figure(figsize=(1 + 4.2 * len(modes), 6.2), layout="constrained")
    axes = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
    for ax, mode in zip(axes, modes, strict=True):
        mine = [line for line in lines if line.mode == mode]
        cases = list(dict.fromkeys((NAMES[x.cell], x.dtype, x.where) for x in mine))
        providers = [p for p in dict.fromkeys(x.provider for x in mine) if p != mine[0].baseline]
        height = 0.8 / max(1, len(providers))
        for i, provider in enumerate(providers):
            own = [x for x in mine if x.provider == provider]
            at = [cases.index((NAMES[x.cell], x.dtype, x.where)) + i * height for x in own]
            bars = ax.barh(at, [x.ratio for x in own], height=0.9 * height, label=provider)
            ax.bar_label(bars, [f"{x.ratio:.2f}" for x in own], padding=2, fontsize=7)
        ax.axvline(1, color="black", linewidth=1)
        ax.margins(x=0.12)  # for the labels
        ax.set_yticks(range(len(cases)), [f"{c} {d} {w}" for c, d, w in cases], fontsize=7)
        ax.set(title=mode, xlabel=f"times as fast as {mine[0].baseline}")
    axes[0].invert_yaxis()
    axes[0].legend(fontsize=7)
    figure.suptitle(f"{lines[0].shapes}: {lines[0].machine.device_name}", fontsize=9)
    figure.savefig(path, dpi=120)


def plots(lines: Sequence[Line], folder: Path) -> list[Path]:
    """A picture for each set and kind of device; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for shapes, device in dict.fromkeys((line.shapes, line.machine.device) for line in lines):
        mine = [line for line in lines if (line.shapes, line.machine.device) == (shapes, device)]
        if len({line.provider for line in mine}) > 1:
            name = shapes if shapes == device else f"{shapes}-{device}"
            paths.append(folder / f"speed-{name}.png")
            plot(list({(_key(x), x.provider): x for x in mine}.values()), paths[-1])
    return paths


def files(arguments: Iterable[Path]) -> list[Path]:
    """Files of lines, and those in folders."""
    paths: list[Path] = []
    for path in arguments:
        paths += sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    return paths


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("lines", nargs="*", type=Path, default=[RESULTS])
    parser.add_argument("--plots", type=Path, help="a folder for pictures")
    args = parser.parse_args(argv)
    if args.plots:
        require("matplotlib")
    lines = records.read(files(args.lines))
    print("\n\n".join(part for part in (tables(lines), missing(lines)) if part))
    for path in plots(lines, args.plots) if args.plots else ():
        print(f"\nwrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
