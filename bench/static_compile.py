"""What the compiler makes of a sweep, for any target and without a GPU.

The arguments of a kernel come from the launcher itself (`kernels/sweeps.py`), asked with tensors
that have no memory.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Protocol

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_rnn import cells
from fused_rnn.cells.builtin import CELLS
from fused_rnn.kernels.cell import KernelCell
from fused_rnn.kernels.chips import Limits
from fused_rnn.kernels.launch import Launch
from fused_rnn.kernels.plan import DoesNotFit, Plan, Precision
from fused_rnn.kernels.sweep import DeviceLayout, Sweep, SweepOptions
from fused_rnn.kernels.sweeps import prepare_forward, prepare_reverse
from fused_rnn.spec.cells import Cell

DTYPES: dict[str, tuple[torch.dtype, Precision]] = {
    "fp32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "fp16": (torch.float16, "tf32"),
    "bf16": (torch.bfloat16, "tf32"),
}  # and their precision
# Of a sweep; an option that is off passes None, which is a constant: its code is not there, and the
# rows are those of a kernel that never heard of it. "none" is the kernel without.
OPTIONS = ("none", "lengths", "reset", "restart", "zoneout", "zones", "drop", "clip")
ALL = ("lengths", "restart", "zones", "drop", "clip")
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
T, B = 4, 8  # of the tensors that the launcher is asked with; no kernel depends on them

COUNTED = {
    "bar": ("BAR",),
    "ldsm": ("LDSM",),
    "lds": ("LDS",),
    "sts": ("STS", "STSM"),
    "ldg": ("LDG",),
    "stg": ("STG",),
    "hmma": ("HMMA",),
    "hgmma": ("HGMMA", "UTCHMMA"),
    "spilled": ("LDL", "STL"),
}


def kernels_of(cell: str) -> KernelCell:
    """How the kernels run a cell of :mod:`fused_rnn.cells`."""
    known: Cell = CELLS[cell] if cell in CELLS else getattr(cells, cell)
    if known.kernels is None:
        raise DoesNotFit(str(known.no_kernels))
    return known.kernels


def launched(
    kernel: str,
    cell: str,
    H: int,
    dtype: str,
    limits: Limits,
    plan: Plan,
    D: int = 1,
    packed: bool = False,
    options: tuple[str, ...] = (),
    heads: int = 1,
) -> Launch:
    """What the launcher would launch of one sweep.

    Args:
        kernel: "inference", "forward" (which saves) or "reverse".
        cell: a name of :mod:`fused_rnn.cells`.
        H: hidden units, of a head.
        dtype: a key of ``DTYPES``.
        limits: the chip.
        plan: how it runs.
        D: directions.
        packed: whether the sequences are packed.
        options: some of ``OPTIONS``.
        heads: of each direction.
    """
    kind, precision = DTYPES[dtype]
    known, N, W, k = kernels_of(cell), T * B, heads * H, heads

    def empty(*shape: int, dtype: torch.dtype = kind) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    layout = DeviceLayout(T, B, N, empty(T + 1, dtype=torch.int64) if packed else None)
    K, P = known.states - 1, known.parameters
    sweep_options = _options(options, K, N, D, W, empty)
    reverse = tuple(d == 1 for d in range(D))
    sweep = Sweep(known, layout, reverse, precision, plan, sweep_options, heads)
    gates, w = empty(D * k, N, H, known.slots), empty(D * k, known.gates * H, H)
    out, h0, target = empty(N, D * W), empty(D, B, W), gpu_target(limits)
    c0 = empty(D, B, K * W) if K else None
    vectors = empty(D, P, W) if P else None
    if kernel != "reverse":
        bias = empty(D * k, H) if known.splits_last_gate else None
        save = kernel == "forward"
        return prepare_forward(
            sweep, gates, w, bias, h0, c0, out, save=save, vectors=vectors, target=target
        )[0]
    saved = gates if known.keeps_gates or sweep_options.zoned else None
    c_seq = empty(N, D * K * W, dtype=torch.float32) if K else None
    grads = out, h0, c0, None, vectors  # of the same shapes
    return prepare_reverse(sweep, saved, c_seq, out, w, h0, c0, *grads, target=target)[0]


def _options(names: tuple[str, ...], K: int, N: int, D: int, H: int, empty: Any) -> SweepOptions:
    """The options of these names, their tensors made by ``empty``."""
    restart, zoned = "restart" in names, "zones" in names
    reset = "reset" in names or restart
    return SweepOptions(
        lengths=empty(B, dtype=torch.int32) if "lengths" in names else None,
        reset=empty(D, N, dtype=torch.uint8) if reset else None,
        restart_h=empty(D, H) if restart else None,
        restart_c=empty(D, K * H) if restart and K else None,
        zone_h=empty(N, D * H, dtype=torch.uint8) if zoned else None,
        zone_c=empty(N, D * K * H, dtype=torch.uint8) if zoned and K else None,
        zoneout=0.1 if "zoneout" in names and not zoned else None,
        drop=empty(D, B, H) if "drop" in names else None,
        clip=1.0 if "clip" in names else None,
    )


def compile_sweep(
    kernel: str,
    cell: str,
    H: int,
    dtype: str,
    limits: Limits,
    plan: Plan,
    *,
    options: tuple[str, ...] = (),
    heads: int = 1,
    **constants: Any,
) -> Any:
    """What triton.compile makes of one sweep.

    Args:
        kernel: "inference", "forward" or "reverse".
        cell: a name of :mod:`fused_rnn.cells`.
        H: hidden units, of a head.
        dtype: a key of ``DTYPES``.
        limits: the chip.
        plan: how it runs.
        options: some of ``OPTIONS``.
        heads: of the layer.
        **constants: arguments of the kernel that are constants, in the place of what is launched.
    """
    what = launched(kernel, cell, H, dtype, limits, plan, options=options, heads=heads)
    types = {name: POINTERS[t.dtype] for name, t in what.tensors.items() if t is not None}
    if plan.programs > 1:
        types["counters"] = "*i32"  # made by the launch
    numbers = {name: n for name, n in what.numbers.items() if n is not None}
    types |= {name: "i32" if isinstance(n, int) else "fp32" for name, n in numbers.items()}
    types = {name: kind for name, kind in types.items() if name not in constants}
    fixed = what.variant.constants | constants
    fixed |= {n: None for n in what.variant.kernel.arg_names if n not in types and n not in fixed}
    return compile_kernel(what.variant.kernel, types, fixed, limits, what.variant.options)


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


def weight_reads(ttgir: str, batch_axis: int = -1, block_b: int = 16) -> dict[str, int]:
    """Bytes of weights that the time loop reads again, found in Triton's own IR.

    A read of shared memory that was filled before the loop, be it by wgmma, or a load through a
    pointer that the loop does not advance, wider along ``batch_axis`` than a batch tile is.
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
        elif m := re.search(r"warp_group_dot (%\w+), .* : !ttg\.memdesc<([\dx]+)x(\w+),", line):
            if m[1] not in defined:  # wgmma reads them itself
                reads["weights_shared"] += _elements(m[2]) * size[m[3]]
        elif (m := re.search(r"tt\.load .*tensor<([\dx]+)x!tt\.ptr<(\w+)>", line)) and (
            int(m[1].split("x")[batch_axis]) > max(16, block_b)
        ):
            reads["weights_global"] += _elements(m[1]) * size[m[2]]
    return reads


def _elements(shape: str) -> int:
    product = 1
    for n in shape.split("x"):
        product *= int(n)
    return product


def tool(name: str, *arguments: str) -> str:
    """What one of Triton's own tools of NVIDIA's prints."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match, f"no {pattern} in the compiler's output"
    return int(match[1])


class Counts(Protocol):
    """A row that takes up what is counted."""

    block_b: int
    registers: int
    spill: int
    shared: int


def measure(row: Counts, compiled: Any, batch_axis: int = -1) -> None:
    """Fill in what the compiled kernel tells; ``batch_axis`` is that of its tiles."""
    row.shared = compiled.metadata.shared
    reads = weight_reads(compiled.asm["ttgir"], batch_axis, row.block_b)
    for name, value in reads.items():
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
        usage = tool("cuobjdump", "--dump-resource-usage", str(cubin))
        row.registers = _number(r"REG:(\d+)", usage)
        row.spill = _number(r"STACK:(\d+)", usage)
        for name, value in loop_counts(tool("nvdisasm", "-c", str(cubin))).items():
            setattr(row, name, value)
