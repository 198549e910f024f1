"""Compile the sweeps for every target, without a GPU, and count what is in their time loop.

    python -m bench.static [--json FILE] [--target 80 90] [--cell lstm] [--hidden 128]
    python -m bench.static --capacity
    python -m bench.static --compare [--target 80 90] [--cell lstm] [--hidden 64 128]
    python -m bench.static --options [--target 90] [--cell lstm] [--hidden 128 512]

One row per kernel: its regime and the programs of a group; registers, spilled bytes and shared
memory of the program; in the time loop, per warp and step: instructions (of streamed weights, those
of one tile), barriers, shared and global accesses, tensor instructions, and the bytes of weights
that the loop reads again (0: they stay in registers). --capacity prints the largest hidden size of
each regime instead, and compiles nothing. --compare adds the kernels of FlashRNN and TorchRL where
they are installed; their name stands in the column of the regime.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from itertools import chain, product

import triton

from bench import static_peers
from bench.static_compile import (
    ALL,
    DTYPES,
    OPTIONS,
    compile_kernel,
    compile_sweep,
    kernels_of,
    measure,
)
from fused_rnn import cells as zoo
from fused_rnn.cells.builtin import CELLS
from fused_rnn.kernels.chips import LIMITS, Limits
from fused_rnn.kernels.plan import DoesNotFit, Plan, PlanRequest
from fused_rnn.kernels.planner import make_plan

KERNELS = ("inference", "forward", "reverse")


@dataclasses.dataclass
class Row:
    """One line of the table; -1 where a number is not known for the target."""

    kernel: str
    cell: str
    dtype: str
    hidden: int
    target: str
    regime: str
    programs: int
    block_h: int
    block_b: int
    warps: int
    options: str = "none"
    batch: int = 8
    registers: int = -1
    spill: int = -1
    shared: int = -1
    instr: int = -1
    bar: int = -1
    ldsm: int = -1
    lds: int = -1
    sts: int = -1
    ldg: int = -1
    stg: int = -1
    hmma: int = -1
    hgmma: int = -1
    spilled: int = -1
    weights_shared: int = -1
    weights_global: int = -1


def plan_for(cell: str, H: int, dtype: str, limits: Limits, heads: int = 1, batch: int = 8) -> Plan:
    """The plan of one direction of some heads of H units."""
    kind, precision = DTYPES[dtype]
    request = PlanRequest(kernels_of(cell), H, kind, batch, heads, precision, heads=heads)
    return make_plan(request, limits)


def planned_row(kernel: str, cell: str, dtype: str, H: int, target: str, plan: Plan) -> Row:
    """A row with what is known before compiling."""
    shape = plan.programs, plan.block_h, plan.block_b, plan.warps
    return Row(kernel, cell, dtype, H, target, plan.regime, *shape)


def capacity(limits: Limits, cell: str, dtype: str, step: int = 32, most: int = 4096) -> list[int]:
    """Largest H with the weights in one program's, a group's registers, and anywhere on the chip.

    A multiple of `step`; 0 for none.
    """
    largest = [0, 0, 0]
    for H in range(step, most + 1, step):
        try:
            plan = plan_for(cell, H, dtype, limits)
        except DoesNotFit:
            break
        if plan.regime == "streamed":
            break
        home = 0 if plan.programs == 1 else 1 if plan.weights == "registers" else 2
        largest[home:] = [H] * (3 - home)
    return largest


def print_capacity(targets: list[str], names: list[str], dtypes: list[str]) -> None:
    """The table of capacities, in Markdown."""
    print("Largest hidden size, batch 8: one program / a group, registers / a group, whole chip\n")
    columns = [(cell, dtype) for cell in names for dtype in dtypes]
    print("| GPU |" + "".join(f" {cell} {dtype} |" for cell, dtype in columns))
    print("|---|" + "---|" * len(columns))
    for target, limits in LIMITS.items():
        if str(target) in targets:
            sizes = ("/".join(map(str, capacity(limits, *column))) for column in columns)
            name = f"sm_{target}" if isinstance(target, int) else target
            print(f"| {name}, {limits.sms} SMs |" + "".join(f" {s} |" for s in sizes), flush=True)


def rows(
    targets: list[str],
    names: list[str],
    hidden: list[int],
    dtypes: list[str],
    kernels: list[str],
    options: list[str],
    heads: int = 1,
    batch: int = 8,
) -> Iterator[Row]:
    """Every row asked for that has a plan."""
    for target, limits in LIMITS.items():
        if str(target) not in targets:
            continue
        for cell in names:
            for dtype in dtypes:
                for H in hidden:
                    try:
                        plan = plan_for(cell, H, dtype, limits, heads, batch)
                    except DoesNotFit:
                        continue
                    for kernel, option in product(kernels, options):
                        row = planned_row(kernel, cell, dtype, H, str(target), plan)
                        row.options, row.batch = option, batch
                        names_of = {"none": (), "all": ALL}.get(option, (option,))
                        what = kernel, cell, H, dtype, limits, plan
                        measure(row, compile_sweep(*what, options=names_of, heads=heads))
                        yield row


def peer_rows(
    targets: list[str], names: list[str], hidden: list[int], dtypes: list[str], kernels: list[str]
) -> Iterator[Row]:
    """The same of the installed peers, on NVIDIA's chips; says why others are left out."""
    for peer in static_peers.JOBS:
        if reason := static_peers.why_not(peer):
            print(f"skipped: {peer}: {reason}", flush=True)
            continue
        chips = [v for k, v in LIMITS.items() if str(k) in targets and isinstance(k, int)]
        for limits, cell, dtype, H, kernel in product(chips, names, dtypes, hidden, kernels):
            for job in static_peers.jobs(peer, kernel, cell, H, dtype):
                shape = 1, H, job.block_b, job.warps
                row = Row(kernel, cell, dtype, H, str(limits.target), job.peer, *shape)
                options = static_peers.options(job)
                try:
                    compiled = compile_kernel(job.fn, job.types, job.constants, limits, options)
                except triton.CompilationError as error:
                    why = error.__cause__ or error
                    while why.__cause__:
                        why = why.__cause__
                    print(f"skipped: {job.peer}: {cell} {kernel} {dtype}: {why}", flush=True)
                    continue
                measure(row, compiled, batch_axis=0)
                yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    everything = [str(t) for t in LIMITS]
    parser.add_argument("--target", nargs="*", default=everything, choices=everything)
    parser.add_argument(
        "--cell", nargs="*", default=["rnn_tanh", "gru", "lstm"], choices=[*CELLS, *zoo.__all__]
    )
    parser.add_argument("--hidden", nargs="*", type=int, default=[64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--heads", type=int, default=1, help="of as many hidden units each")
    parser.add_argument("--batch", type=int, default=8, help="sequences, for which the plan is")
    parser.add_argument("--dtype", nargs="*", default=["bf16"], choices=DTYPES)
    parser.add_argument("--kernel", nargs="*", default=KERNELS, choices=KERNELS)
    parser.add_argument("--json", help="also write the rows to this file, one JSON object a line")
    parser.add_argument("--capacity", action="store_true", help="the largest hidden sizes instead")
    choices = [*OPTIONS, "all"]
    parser.add_argument("--options", nargs="*", default=["none"], choices=choices)
    parser.add_argument("--compare", action="store_true", help="the peers' kernels, too")
    args = parser.parse_args()
    if args.capacity:
        print_capacity(args.target, args.cell, args.dtype)
        return
    if os.environ.get("TRITON_INTERPRET"):
        sys.exit("unset TRITON_INTERPRET: an interpreted kernel is not compiled")

    names = [f.name for f in dataclasses.fields(Row)]
    width = {n: max(len(n), {"regime": 14, "kernel": 9, "cell": 8}.get(n, 6)) for n in names}
    print(f"Triton {triton.__version__}\n" + " ".join(n.rjust(width[n]) for n in names))
    out = open(args.json, "w") if args.json else None  # noqa: SIM115
    asked = args.target, args.cell, args.hidden, args.dtype, args.kernel
    for row in chain(
        rows(*asked, args.options or choices, args.heads, args.batch),
        peer_rows(*asked) if args.compare else (),
    ):
        values = dataclasses.asdict(row)
        print(
            " ".join(str("-" if v == -1 else v).rjust(width[n]) for n, v in values.items()),
            flush=True,
        )
        if out:
            out.write(json.dumps(values | {"triton": triton.__version__}) + "\n")
            out.flush()


if __name__ == "__main__":
    main()
