"""Compile the sweeps for every target, without a GPU, and count what is in their time loop.

    python -m bench.static [--json FILE] [--target 80 90] [--cell lstm] [--hidden 128]
    python -m bench.static --capacity
    python -m bench.static --compare [--target 80 90] [--cell lstm] [--hidden 64 128]
    python -m bench.static --extras [--target 90] [--cell lstm] [--hidden 128 512]

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
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import chain, product
from pathlib import Path
from typing import Any, Literal

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench import static_extras, static_peers
from fused_rnn.kernels import backward, cells, forward
from fused_rnn.kernels.group import launch_options, sweep_constants
from fused_rnn.kernels.plan import LIMITS, SPECS, DoesNotFit, Limits, Plan, make_plan

DTYPES: dict[str, Literal["ieee", "tf32"]] = {
    "fp32": "ieee",
    "tf32": "tf32",
    "fp16": "tf32",
    "bf16": "tf32",
}  # and their precision
KERNELS = ("inference", "forward", "reverse")
COUNTED = {
    "bar": ("BAR",),
    "ldsm": ("LDSM",),
    "lds": ("LDS",),
    "sts": ("STS", "STSM"),
    "ldg": ("LDG",),
    "stg": ("STG",),
    "hmma": ("HMMA",),
    "hgmma": ("HGMMA", "UTCHMMA"),
}


@dataclasses.dataclass
class Row:
    """One line of the table; -1 where a number is not known for the target."""

    kernel: str
    cell: str
    dtype: str
    hidden: int
    target: str
    regime: str
    members: int
    block_h: int
    block_b: int
    warps: int
    extras: str = "none"
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
    weights_shared: int = -1
    weights_global: int = -1


def _arguments(
    kernel: str,
    cell: str,
    H: int,
    dtype: str,
    D: int,
    packed: bool,
    plan: Plan,
    target: GPUTarget,
    extras: tuple[str, ...] = (),
) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """The Triton function, the types of its run-time arguments, its constants."""
    spec = SPECS[cell]
    constants: dict[str, Any]
    x = "*fp32" if dtype in ("fp32", "tf32") else f"*{dtype}"
    lstm, gates = spec.states == 2, spec.slots == 4
    integers = ("T", "B", "N", "first_tile", "first_direction", "reverse")
    types = dict.fromkeys(integers, "i32") | {"scale": "fp32", "w": x}
    constants = sweep_constants(plan, D, target) | {
        "G": spec.gates,
        "STATES": spec.states,
        "H": H,
        "PRECISION": DTYPES[dtype],
    }
    if plan.members > 1:
        types["counters"] = "*i32"
    if packed:
        types["offsets"] = "*i64"
    if kernel == "reverse":
        fn = backward.backward_kernel
        types |= dict.fromkeys(("dout", "dh_n", "dgates"), x)
        types |= {"states": "*fp32" if lstm else x, "dh0": "*fp32", "zero": "i32"}
        if plan.members > 1:
            types["partials"] = "*fp32"
        if gates:
            types |= {"gates": x, "initial": types["states"]}
        if lstm:
            types |= {"dc_n": "*fp32", "dc0": "*fp32"}
        constants |= backward.plan_constants(plan)
        constants |= {"FACTORS": cells.FACTORS[cell], "ADJOINT": cells.ADJOINTS[cell]}
        constants["CELL_STATE"] = cells.CELL_STATES.get(cell)
    else:
        fn = forward.forward_kernel
        types |= dict.fromkeys(("gates", "h0", "out", "h_n"), x)
        if spec.gates == 3:
            types["bias"] = x
        if lstm:
            types |= {"c0": "*fp32", "c_n": "*fp32"}
            if kernel == "forward":
                types["c_seq"] = "*fp32"
        if packed and plan.members > 1:
            types["fed"] = x
        constants |= forward.plan_constants(plan)
        constants |= {"STEP": cells.STEPS[cell], "SAVE": kernel == "forward"}
    types |= static_extras.types(extras, kernel, lstm, plan.members > 1, x, types.get("states"))
    for name in fn.arg_names:
        if name not in types and name not in constants:
            constants[name] = None
    return fn, {n: t for n, t in types.items() if n in fn.arg_names}, constants


def compile_sweep(
    kernel: str,
    cell: str,
    H: int,
    dtype: str,
    limits: Limits,
    plan: Plan,
    D: int = 1,
    packed: bool = False,
    extras: tuple[str, ...] = (),
) -> Any:
    """What triton.compile makes of one sweep; ``extras`` are some of `static_extras.EXTRAS`."""
    what = kernel, cell, H, dtype, D, packed, plan, gpu_target(limits), extras
    fn, types, constants = _arguments(*what)
    return compile_kernel(fn, types, constants, limits, launch_options(plan))


def compile_kernel(
    fn: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    limits: Limits,
    options: dict[str, Any],
) -> Any:
    """What triton.compile makes of a Triton function, its pointers aligned to 16 bytes."""
    source = ASTSource(
        fn,
        signature={n: types.get(n, "constexpr") for n in fn.arg_names},
        constexprs=constants,
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, n in enumerate(fn.arg_names)
            if types.get(n, "").startswith("*")
        },
    )
    return triton.compile(source, target=gpu_target(limits), options=options)


def gpu_target(limits: Limits) -> GPUTarget:
    """What Triton compiles for."""
    backend = "cuda" if isinstance(limits.target, int) else "hip"
    return GPUTarget(backend, limits.target, limits.warp)


def loop_counts(sass: str) -> dict[str, int]:
    """Instructions of the largest loop of a listing by nvdisasm, in all and by kind."""
    labels: dict[str, int] = {}
    code: list[tuple[str, str]] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*\.(L_x_\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(
            r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?\s*([A-Z][\w.]*)(.*)", line
        ):
            code.append((instruction[1], instruction[2]))
    loop: list[str] = []
    for end, (op, rest) in enumerate(code):
        target = re.search(r"`\(\.(L_x_\w+)\)", rest)
        start = labels.get(target[1], end + 1) if target and op.startswith("BRA") else end + 1
        if end - start >= len(loop):
            loop = [op for op, _ in code[start : end + 1]]
    counts = {"instr": len(loop)}
    for name, bases in COUNTED.items():
        counts[name] = sum(op.split(".")[0] in bases for op in loop)
    return counts


def weight_reads(ttgir: str, batch_axis: int = -1) -> dict[str, int]:
    """Bytes of weights that the time loop reads again, found in Triton's own IR.

    A read of shared memory that was filled before the loop, or a load through a pointer that the
    loop does not advance, wider along ``batch_axis`` than a batch tile is.
    """
    size = {"bf16": 2, "f16": 2, "f32": 4}
    lines = ttgir.splitlines()
    loops = []
    for i, line in enumerate(lines):
        if "scf.for" in line or "scf.while" in line:
            indent = len(line) - len(line.lstrip())
            end = next(
                j
                for j in range(i + 1, len(lines))
                if lines[j].startswith(" " * indent + "}") and "} do {" not in lines[j]
            )
            loops.append(lines[i : end + 1])
    body = max(loops, key=len)
    defined = {m[1] for line in body if (m := re.match(r"\s*(%[\w#]+)(?::\d+)? =", line))}
    reads = {"weights_shared": 0, "weights_global": 0}
    for line in body:
        if m := re.search(r"ttg\.local_load (%\w+).*memdesc<([\dx]+)x(\w+),", line):
            if m[1] not in defined:
                reads["weights_shared"] += _elements(m[2]) * size[m[3]]
        elif (m := re.search(r"tt\.load .*tensor<([\dx]+)x!tt\.ptr<(\w+)>", line)) and (
            int(m[1].split("x")[batch_axis]) > 16  # no batch tile is wider
        ):
            reads["weights_global"] += _elements(m[1]) * size[m[2]]
    return reads


def _elements(shape: str) -> int:
    product = 1
    for n in shape.split("x"):
        product *= int(n)
    return product


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match, f"no {pattern} in the compiler's output"
    return int(match[1])


def measure(row: Row, compiled: Any, batch_axis: int = -1) -> None:
    """Fill in what the compiled kernel tells; ``batch_axis`` is that of its tiles."""
    row.shared = compiled.metadata.shared
    for name, value in weight_reads(compiled.asm["ttgir"], batch_axis).items():
        setattr(row, name, value)
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        row.registers = _number(r"\.vgpr_count:\s+(\d+)", text)
        # Not vgpr_spill_count, which counts moves into accumulation registers, too.
        row.spill = _number(r"\.private_segment_fixed_size:\s+(\d+)", text)
        return
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", str(cubin))
        row.registers = _number(r"REG:(\d+)", usage)
        row.spill = _number(r"STACK:(\d+)", usage)
        for name, value in loop_counts(_tool("nvdisasm", "-c", str(cubin))).items():
            setattr(row, name, value)


def plan_for(cell: str, H: int, dtype: str, limits: Limits) -> Plan:
    """The plan of a batch of 8, one direction."""
    return make_plan(cell, H, 4 if "32" in dtype else 2, 8, 1, limits, precision=DTYPES[dtype])


def planned_row(kernel: str, cell: str, dtype: str, H: int, target: str, plan: Plan) -> Row:
    """A row with what is known before compiling."""
    shape = plan.members, plan.block_h, plan.block_b, plan.warps
    return Row(kernel, cell, dtype, H, target, plan.regime, *shape)


def capacity(limits: Limits, cell: str, dtype: str, step: int = 32, most: int = 4096) -> list[int]:
    """Largest H with the weights in one program's, a group's registers, and anywhere on the chip.

    A multiple of `step`; 0 for none.
    """
    found = [0, 0, 0]
    for H in range(step, most + 1, step):
        try:
            plan = plan_for(cell, H, dtype, limits)
        except DoesNotFit:
            break
        if plan.regime == "streamed":
            break
        home = 0 if plan.members == 1 else 1 if plan.weights == "registers" else 2
        found[home:] = [H] * (3 - home)
    return found


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
    extras: list[str],
) -> Iterator[Row]:
    """Every row asked for that has a plan."""
    for target, limits in LIMITS.items():
        if str(target) not in targets:
            continue
        for cell in names:
            for dtype in dtypes:
                for H in hidden:
                    try:
                        plan = plan_for(cell, H, dtype, limits)
                    except DoesNotFit:
                        continue
                    for kernel, extra in product(kernels, extras):
                        row = planned_row(kernel, cell, dtype, H, str(target), plan)
                        row.extras = extra
                        names_of = {"none": (), "all": static_extras.ALL}.get(extra, (extra,))
                        what = kernel, cell, H, dtype, limits, plan
                        measure(row, compile_sweep(*what, extras=names_of))
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
    parser.add_argument("--cell", nargs="*", default=["rnn_tanh", "gru", "lstm"], choices=SPECS)
    parser.add_argument("--hidden", nargs="*", type=int, default=[64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--dtype", nargs="*", default=["bf16"], choices=DTYPES)
    parser.add_argument("--kernel", nargs="*", default=KERNELS, choices=KERNELS)
    parser.add_argument("--json", help="also write the rows to this file, one JSON object a line")
    parser.add_argument("--capacity", action="store_true", help="the largest hidden sizes instead")
    choices = [*static_extras.EXTRAS, "all"]
    parser.add_argument("--extras", nargs="*", default=["none"], choices=choices)
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
        rows(*asked, args.extras or choices), peer_rows(*asked) if args.compare else ()
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
