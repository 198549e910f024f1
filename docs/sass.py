"""Write docs/sass.md: what the compiler makes of the forward sweep, explained instruction by class.

    python docs/sass.py [FILE]

Compiles for sm_90 with Triton's own tools, which needs no GPU. The commentary below belongs to the
instructions that it was written for: if the compiler makes others, the script says so and writes
nothing.
"""

import dataclasses
import os
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from textwrap import fill
from typing import Any

import triton

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import static, static_compile
from fused_rnn.kernels.chips import LIMITS
from fused_rnn.kernels.plan import Plan

TARGET = 90
COLUMNS = {
    "instr": "instructions",
    "bar": "barriers",
    "hmma": "mma.sync",
    "hgmma": "wgmma",
    "spill": "spilled bytes",
    "shared": "shared memory",
}
Loop = list[str]  # the instructions of the time loop
# What the phases between the barriers of a step hold, and what each class is there for.
PHASES = [
    {
        "LDG": "load the input part of step t + 1",
        "MUFU": "16 gates and 4 c, of 4 units and sequences",
        "F2FP": "h as bf16",
    },
    {"STSM": "h to shared memory, for the product"},
    {
        "LDSM": "all of h, the right operand: each warp needs it",
        "HMMA": "W h; the left operand is in registers",
    },
    {
        "HMMA": "the product goes on",
        "STS": "h once more, in memory's order",
    },
    {
        "HMMA": "the rest of the product",
        "LDS": "h as it will lie in memory",
        "STG": "h of step t, where a sequence is running",
    },
    {"STSM": "the input part has arrived: memory's order"},
    {
        "LDSM": "the same, as the product's result lies",
        "FADD": "the pre-activations of step t + 1",
        "BRA": "next step",
    },
]
BARRIER = {
    "BAR": "all threads have stored their part of h",
    "MEMBAR": "release: their stores are visible to all",
    "REDG": "one thread counts this program in",
    "LDG": "one thread reads the counter",
    "BRA": "again, until all programs are counted",
    "CCTL": "acquire: drop L1's lines, which may be stale",
}
KINDS = {
    "tensor product": ("HMMA",),
    "tanh": ("MUFU",),
    "other arithmetic, fp32 and bf16": ("FADD", "FMUL", "FFMA", "F2FP", "PRMT"),
    "global load and store": ("LDG", "STG"),
    "shared memory load and store": ("LDSM", "LDS", "STSM", "STS"),
    "barrier of the program": ("BAR",),
}


def variant(target: int, H: int, scaled: bool = True, **changes: Any) -> list[int]:
    """The columns for a plan with some changes; not scaled: weights come straight from a load."""
    plan = dataclasses.replace(static.plan_for("lstm", H, "bf16", LIMITS[target]), **changes)
    constants = {} if scaled else {"scale": None}
    row = static.planned_row("inference", "lstm", "bf16", H, str(target), plan)
    what = "inference", "lstm", H, "bf16", LIMITS[target], plan
    compiled = static_compile.compile_sweep(*what, **constants)
    static_compile.measure(row, compiled)
    return [getattr(row, name) for name in COLUMNS]


def variants() -> list[str]:
    """A table of what the loop would be if the source were written another way."""
    changes: list[tuple[str, int, dict[str, Any]]] = [
        ("as it is", 128, {}),
        ("accurate tanh", 128, {"fast": False}),
        ("no multiplication by 1.0", 128, {"scaled": False}),
        ("plain dot", 128, {"m_split": 1}),
        ("plain dot, no multiplication", 128, {"m_split": 1, "scaled": False}),
        ("as it is", 1024, {}),
        ("plain dot", 1024, {"k_split": 1, "m_split": 1}),
    ]
    lines = [f"| H | source | {' | '.join(COLUMNS.values())} |", "|" + "---|" * (2 + len(COLUMNS))]
    for name, H, change in changes:
        both = zip(*(variant(target, H, **change) for target in (80, 90)), strict=True)
        lines.append(f"| {H} | {name} | {' | '.join(f'{a} / {b}' for a, b in both)} |")
    return lines


def compile_loop(H: int) -> tuple[Plan, Loop, dict[str, int]]:
    """The plan of an LSTM in bf16 without gradients, its time loop, and what it reads again."""
    limits = LIMITS[TARGET]
    plan = static.plan_for("lstm", H, "bf16", limits)
    compiled = static_compile.compile_sweep("inference", "lstm", H, "bf16", limits, plan)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        listing = static_compile.tool("nvdisasm", "-c", str(cubin))
    facts = {"shared": compiled.metadata.shared} | static_compile.weight_reads(
        compiled.asm["ttgir"]
    )
    return plan, time_loop(listing), facts


def time_loop(listing: str) -> Loop:
    """The largest loop of a listing by nvdisasm."""
    labels: dict[str, int] = {}
    code: Loop = []
    loop: Loop = []
    for line in listing.splitlines():
        if label := re.match(r"\s*\.(L_x_\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            code.append(re.sub(r"\s+", " ", instruction[1]))
    for end, instruction in enumerate(code):
        target = re.search(r"BRA.*`\(\.(L_x_\w+)\)", instruction)
        start = labels.get(target[1], end + 1) if target else end + 1
        if end - start >= len(loop):
            loop = code[start : end + 1]
    return loop


def base(instruction: str) -> str:
    """The class of an instruction, without predicate and modifiers."""
    return re.sub(r"^@!?U?P\d+ ", "", instruction).split()[0].split(".")[0]


def written(instruction: str) -> set[int]:
    """Registers that an instruction writes, generously."""
    name = re.sub(r"^@!?U?P\d+ ", "", instruction)
    if base(instruction) in ("STG", "STS", "STSM", "BAR", "BRA", "REDG"):
        return set()
    first = re.search(r"\bR(\d+)", name)
    wide = 4 if re.search(r"HMMA|\.4 |\.128", name) else 1
    wide = 2 if wide == 1 and re.search(r"\.64|CS2R|\.2 ", name) else wide
    return set(range(int(first[1]), int(first[1]) + wide)) if first else set()


def weight_registers(loop: Loop) -> set[int]:
    """Registers of the left operands of all products."""
    found: set[int] = set()
    for instruction in loop:
        if base(instruction) == "HMMA":
            operands = re.findall(r"\bR(\d+|Z)", instruction)
            found |= set(range(int(operands[1]), int(operands[1]) + 4))
    return found


def require(condition: bool, what: str) -> None:
    """Stop if the commentary would not fit."""
    if not condition:
        sys.exit(f"docs/sass.py: {what}; the commentary has to be looked at again")


def phases(loop: Loop) -> list[Loop]:
    """The loop, cut behind each barrier."""
    found: list[Loop] = [[]]
    for instruction in loop:
        found[-1].append(instruction)
        if base(instruction) == "BAR":
            found.append([])
    return found


def excerpt(loop: Loop) -> list[str]:
    """One line for each class of each phase: how many there are, and the first of them."""
    found = phases(loop)
    require(len(found) == len(PHASES), f"{len(found) - 1} barriers in place of {len(PHASES) - 1}")
    lines = []
    for number, (phase, comments) in enumerate(zip(found, PHASES, strict=True), 1):
        first: dict[str, str] = {}
        for instruction in phase:
            first.setdefault(base(instruction), instruction)
        counts = Counter(map(base, phase))
        missing = comments.keys() - counts.keys()
        require(not missing, f"phase {number} has no {missing}")
        lines.append(f"phase {number}, {len(phase)} instructions")
        for kind in comments:
            lines += entry(counts[kind], first[kind], comments[kind])
        if "BAR" in first:
            lines.append(f"  {counts['BAR']:3} {first['BAR']}")
    return lines


def entry(count: int, instruction: str, comment: str) -> list[str]:
    """A line of an excerpt."""
    instruction = re.sub(r"desc\[\w+\]", "", instruction).replace(".reuse", "")
    return [f"  {count:3} {instruction:<42} {comment}"]


def barrier(loop: Loop) -> list[str]:
    """The barrier of a group: from the block barrier before the release to the one behind."""
    at = [i for i, instruction in enumerate(loop) if base(instruction) == "MEMBAR"]
    require(len(at) == 1, f"{len(at)} releases in a step")
    start = max(i for i in range(at[0]) if base(loop[i]) == "BAR")
    stop = next(i for i in range(at[0], len(loop)) if base(loop[i]) == "BAR")
    end = next(i for i in range(at[0], len(loop)) if base(loop[i]) == "CCTL")
    spin = next(i for i in range(at[0], end) if ".STRONG.GPU" in loop[i] and base(loop[i]) == "LDG")
    again = next(i for i in range(spin, end) if base(loop[i]) == "BRA")
    count = next(i for i in range(at[0], spin) if base(loop[i]) == "REDG")
    lines = []
    for i in (start, at[0], count, spin, again, end, stop):
        comment = BARRIER[base(loop[i])]
        if i == stop:
            comment = "the other threads wait for that one"
        lines += entry(1, loop[i], comment)
    loads = [x for x in loop[stop:] if base(x) == "LDG"]
    require(bool(loads) and all(".STRONG.GPU" in x for x in loads), "h is not read through L2")
    return lines + entry(len(loads), loads[0], "h of all units, through L2")


def table(loop: Loop) -> list[str]:
    """How many instructions of each kind."""
    counts = Counter(map(base, loop))
    rows = [f"| {kind} | {sum(counts[b] for b in bases)} |" for kind, bases in KINDS.items()]
    rest = len(loop) - sum(counts[b] for bases in KINDS.values() for b in bases)
    rows += [f"| addresses, predicates, moves, the loop itself | {rest} |"]
    return ["| kind | instructions |", "|---|---|", *rows, f"| in all | {len(loop)} |"]


def report() -> str:
    """The whole file."""
    plan, loop, facts = compile_loop(128)
    weights = weight_registers(loop)
    overwritten = weights & {r for instruction in loop for r in written(instruction)}
    require(not overwritten, f"the loop writes the registers {sorted(overwritten)} of weights")
    require(facts["weights_shared"] == facts["weights_global"] == 0, "weights are read again")
    needed = 4 * 128 * 128 * 2 // (4 * 32 * plan.warps)
    require(len(weights) == needed, f"{len(weights)} registers of weights, not {needed}")
    group, group_loop, _ = compile_loop(512)
    products = Counter(map(base, loop))["HMMA"]
    parts = [
        "# The time loop in machine code",
        f"""Generated by `python docs/sass.py` with Triton {triton.__version__}, without a GPU.
        These are static counts of code for sm_{TARGET}, not times: those are in
        [speed.md](speed.md). [kernels.md](kernels.md) explains the kernels themselves.""",
        "## One program: LSTM forward, H = 128, bf16, without gradients",
        f"The plan: {plan}. Per warp and time step:",
        table(loop),
        f"""The left operands of the {products} tensor instructions are {len(weights)} registers
        (R{min(weights)} to R{max(weights)}), which nothing in the loop writes: {plan.warps} warps x
        32 threads x {len(weights)} registers x 4 bytes = {len(weights) * plan.warps * 128 // 1024}
        KiB, all of the recurrent weights. Of shared memory the program has {facts["shared"]} bytes,
        most of it for the weights to pass through before the loop.""",
        f"""The barriers of the program cut a step into {len(PHASES)} phases. Of each, the
        instructions that characterise it: how many there are, and the first of them.""",
        ["```text", *excerpt(loop), "```"],
        f"""From one step to the next the chain runs through tanh, through h in shared memory and
        through {loop_chain(loop)} dependent tensor instructions. The load in phase 1, the store in
        phase 5 and the way of the input part through phases 6 and 7 do not wait for the
        product.""",
        "## A group of programs: the barrier of a step, H = 512",
        f"The plan: {group}.",
        ["```text", *barrier(group_loop), "```"],
        """`MEMBAR` and `REDG` are the release of `arrive`, the loop and `CCTL` the acquire of
        `wait` in [kernels/group.py](../kernels/group.py).""",
        "## The same source written another way",
        """LSTM forward in bf16 without gradients, sm_80 / sm_90, per warp and step; memory in
        bytes. [kernels.md](kernels.md) says why each of these is as it is.""",
        variants(),
    ]
    return "\n\n".join(
        fill(" ".join(part.split()), 100) if isinstance(part, str) else "\n".join(part)
        for part in parts
    )


def loop_chain(loop: Loop) -> int:
    """The longest chain of products, each of which adds to the result of the one before."""
    length: dict[str, int] = {}
    for instruction in loop:
        if base(instruction) == "HMMA":
            d, _, _, c = re.findall(r"\b(R(?:\d+|Z))", instruction)
            length[d] = length.get(c, 0) + 1
    return max(length.values())


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET"):
        sys.exit("unset TRITON_INTERPRET: an interpreted kernel is not compiled")
    default = [str(Path(__file__).with_suffix(".md"))]
    Path((sys.argv[1:] or default)[0]).write_text(report() + "\n")
