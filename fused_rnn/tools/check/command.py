"""The command: ``python -m fused_rnn.check --help``."""

import argparse
import json
import os
import signal
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fused_rnn.tools.check import children, report
from fused_rnn.tools.check.rows import NO_KERNELS, SIZES

LONGEST = 1e6  # seconds of a limit; what waits can wait for no more than some centuries

TEXT = """\
Check the layers on this machine: on a GPU the kernels in every regime (persistent, cooperative,
streamed), without one the CPU's engines, and the kernels in Triton's interpreter.

A row is green if the outputs and all gradients have errors of at most twice torch.nn's own in the
same type, plus 1e-5 (fp64: 1e-11) and one rounding of the result's size, both against torch.nn in
fp64 on the same device (in TF32, which cuDNN may do without, or twice those of a loop of TF32
products if they are larger); and if 20 runs more (in the interpreter 3) give the same bits. Only
then its time is taken, in microseconds per time step, beside torch.nn's. A row that hangs or
crashes is red, and the others go on. CUDA_VISIBLE_DEVICES chooses the GPU.

The exit status is 1 if anything is red, else 0.
"""


def main(argv: Sequence[str] | None = None, command: Sequence[str] = children.COMMAND) -> int:
    """Run the command; ``command`` starts a child, see :mod:`fused_rnn.tools.check.children`."""
    parser = argparse.ArgumentParser(
        prog="python -m fused_rnn.check",
        description=TEXT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a few small rows, about ten seconds")
    parser.add_argument(
        "--all",
        action="store_true",
        help="on a GPU each cell in each type in each regime, some minutes; by default each two of "
        "the three meet",
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON, to paste")
    parser.add_argument(
        "--remember",
        action="store_true",
        help="on a GPU, if green: let the planner reckon with the barrier as measured, and tune "
        "the layers of the rows; some seconds for each of up to six plans of a row",
    )
    parser.add_argument(
        "--limit", type=float, default=60, metavar="SECONDS", help="that a row may take (60)"
    )
    args = parser.parse_args(argv)
    if not 0 < args.limit <= LONGEST:
        parser.error(f"--limit: seconds from 0 to {LONGEST:.0f}, not {args.limit:g}")
    if args.remember and not torch.cuda.is_available():
        parser.error("--remember: there is no GPU here, so there is nothing to remember")
    try:
        results = check(args, command)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    if args.json:
        print(json.dumps(results))
    else:
        report.show(results, report.console())
    return 0 if results["green"] else 1


def check(args: argparse.Namespace, command: Sequence[str]) -> report.Report:
    """Check, and with ``--remember`` remember."""
    # What runs without being asked for is to be checked: no interpreter, no tuning on the way.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["FUSED_RNN_TUNE"] = "0"
    task: dict[str, Any] = {"quick": args.quick, "every": args.all}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(
        *columns,
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    ) as progress:
        bar = progress.add_task("starting", total=None)

        def listen(event: dict[str, Any]) -> None:
            if "items" in event:
                progress.update(bar, total=len(event["items"]))
            elif "begins" in event:
                progress.update(bar, description=event["begins"])
            elif "ends" in event:
                progress.advance(bar)

        def run(task: dict[str, Any], limit: float, **more: str) -> Any:
            progress.reset(bar, description="starting", total=None)
            return children.run(task, environment | more, limit, listen, command)

        header, items = run(task, args.limit)
        if header.get("kernels") == NO_KERNELS:
            inner, more = run(task, args.limit, TRITON_INTERPRET="1")
            header["kernels"] = inner.get("kernels")
            items += more
        barrier = [item for item in items if item["kind"] == "barrier"]
        rows = [item for item in items if item["kind"] != "barrier"]
        remembered: list[dict[str, Any]] = []
        if args.remember:
            what = to_remember(rows, barrier)
            # A plan is compiled and timed as a row is, and there are six of them.
            remembered = run({**task, "remember": what}, 6 * args.limit)[1]
    results = {"header": header, "rows": rows, "barrier": barrier, "remembered": remembered}
    return {**results, "green": report.green(results)}


def to_remember(rows: list[dict[str, Any]], barrier: list[dict[str, Any]]) -> dict[str, Any]:
    """The green rows of kernels, and if all of the barrier is green, the median."""
    known = [item["us"] for item in barrier]
    all_green = bool(barrier) and all(item["state"] == "green" for item in barrier)
    kernels = [row for row in rows if row["state"] == "green" and row.get("ran") in SIZES]
    return {"rows": kernels, "hop_us": statistics.median(known) if all_green else None}


def run() -> None:
    """Be the command: its arguments from the command line, its exit status from the rows."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(main())


def _terminate(*_: object) -> None:
    sys.exit(128 + signal.SIGTERM)  # by way of the children's ends
