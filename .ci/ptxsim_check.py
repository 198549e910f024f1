"""Run the compiled sweeps in the PTX emulator beside this checkout, races checked, if it is there.

python .ci/ptxsim_check.py
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
if not (SHARED / "ptxsim").is_dir():
    sys.exit("ptxsim is not here: nothing checked")
sys.path[:0] = [str(SHARED), str(ROOT), str(ROOT / "tests")]

import ptxsim  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from helpers import assert_close, plan_request  # noqa: E402
from sweep_oracle import (  # noqa: E402
    CELLS,
    TOLERANCE,
    Problem,
    check_sweeps,
    group_plan,
)
from triton.backends.compiler import GPUTarget  # noqa: E402

import fused_rnn.kernels.backward as backward  # noqa: E402
import fused_rnn.kernels.forward as forward  # noqa: E402
import fused_rnn.kernels.group as group  # noqa: E402
import fused_rnn.kernels.pack as pack  # noqa: E402
import fused_rnn.kernels.sweeps as sweeps  # noqa: E402
import fused_rnn.kernels.variants as variants  # noqa: E402
from fused_rnn import cells as zoo  # noqa: E402
from fused_rnn.engines import reference  # noqa: E402
from fused_rnn.engines.triton import products  # noqa: E402
from fused_rnn.engines.triton.engine import TritonEngine  # noqa: E402
from fused_rnn.kernels.chips import LIMITS  # noqa: E402
from fused_rnn.kernels.group import LINE  # noqa: E402
from fused_rnn.kernels.planner import make_plan  # noqa: E402
from fused_rnn.spec.batch import BatchLayout  # noqa: E402
from fused_rnn.spec.layer import (  # noqa: E402
    LayerInputs,
    LayerSpec,
    Needs,
    Options,
    OptionTensors,
    OutputGrads,
    Weights,
)

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
KERNELS = {
    forward: ("forward_kernel", forward.forward_kernel),
    backward: ("backward_kernel", backward.backward_kernel),
}
PACKING = {name: getattr(pack, name) for name in ("pack_kernel", "unpack_kernel")}


class Race(AssertionError):
    """Accesses to memory in no order."""


class Emulated:
    """Stands in for a kernel: `kernel[grid](...)` runs its PTX here.

    Among the arguments are options of the compiler and of the launch. launch_cooperative_grid is
    one of them, and always true here: all programs are in flight, and the seed picks who goes on.
    """

    def __init__(self, kernel, arch, seed):
        self.kernel, self.arch, self.seed = kernel, arch, seed
        self.weight_bytes = 0

    def __getitem__(self, grid):
        def launch(**arguments):
            how = {"arch": self.arch, "race_check": True, "schedule": ("random", self.seed)}
            stats = ptxsim.triton_launch(self.kernel, grid, **how, **arguments)
            self.weight_bytes += stats.loads("w").bytes
            if stats.races:
                raise Race("\n".join(stats.races))

        return launch


def emulate(arch, seed, wrong=None):
    """Let all kernels run here, compiled for a GPU of this architecture; returns the two sweeps.

    wrong: a sweep's module, and names in its kernel with what they are to mean instead.
    """
    emulated = []
    for name, kernel in PACKING.items():
        setattr(pack, name, Emulated(kernel, arch, seed))
    for module, (name, kernel) in KERNELS.items():
        if wrong and module is wrong[0]:
            fn = FunctionType(kernel.fn.__code__, kernel.fn.__globals__ | wrong[1])
            fn.__annotations__ = kernel.fn.__annotations__
            kernel = triton.jit(fn)
        emulated.append(Emulated(kernel, arch, seed))
        setattr(variants, name, emulated[-1])
    sweeps.compile_target = lambda device: gpu_target(arch)
    return emulated


def gpu_target(arch):
    """What Triton compiles for."""
    return GPUTarget("cuda", arch, 32)


def check(p: Problem, plan, arch, precision="ieee", seed=0, saves=(True,), wrong=None):
    """Both sweeps of a layer against the fp64 loop; the bytes of weights that each has read."""
    emulated = emulate(arch, seed, wrong)
    check_sweeps(p, plan, precision, use_c_seq=True, saves=saves)
    return [e.weight_bytes for e in emulated]


def check_cell(name, arch):
    """A cell as it is planned: large, of both directions, packed."""
    for dtype, H, B, T, reverse, packed in (
        (BF16, 128, 11, 4, (False,), False),
        (F16, 40, 3, 5, (False, True), False),
        (F32, 24, 3, 0, (False, True), True),
        (F32, 64, 3, 3, (False,), False),
    ):
        plan = make_plan(plan_request(name, H, dtype, B, len(reverse), "ieee"), LIMITS[arch])
        p = Problem(name, dtype, H, B, T, reverse, packed)
        check(p, plan, arch, saves=(False, True) if arch == 80 else (True,))
    print(f"sm_{arch} {name}: numbers right, no race", flush=True)


@dataclass
class Group:
    """A layer for groups of 2 to 5 programs, two of each direction."""

    cell: str
    dtype: torch.dtype
    H: int
    plan: dict[str, Any]
    reverse: tuple[bool, ...] = (False,)
    packed: bool = False
    precision: str = "ieee"


STREAMED = {"regime": "streamed"}
GROUPS = [
    Group("lstm", BF16, 40, {"block_k": 64, "k_split": 4}),
    Group("lstm", F32, 40, {"block_k": 16}, precision="tf32"),
    Group("gru", F16, 40, {"block_h": 32, "block_k": 64, "k_split": 2, "m_split": 2}, (True,)),
    Group("rnn_tanh", BF16, 72, {"block_k": 64, "k_split": 4}),
    Group("lstm", F16, 24, {"tiles": 1}, (False, True), packed=True),
    Group("gru", BF16, 40, {"block_h": 32, "chunks": 1}),  # of two; the other in shared memory
    Group("gru", F32, 40, {"block_h": 8, "block_k": 64, "k_split": 4}),  # in parts
    Group("lstm", F32, 40, {"block_k": 64, "k_split": 2, "m_split": 2}, (False, True)),
    Group("lstm", BF16, 40, {"joined": True, "block_k": 16, "block_h": 32, "chunks": 1}),
    Group("lstm", BF16, 40, STREAMED),
    Group("gru", F32, 24, STREAMED),
    Group("rnn_tanh", F16, 72, STREAMED | {"block_h": 32}, (True,)),
]


def check_group(group, arch):
    """Any schedule has right numbers; weights that stay on the chip are read once."""
    read = {}
    for T, seed in ((3, 0), (3, 1), (6, 2)):
        p = Problem(group.cell, group.dtype, group.H, 9, T, group.reverse, group.packed)
        plan = group_plan(p, warps=4, **group.plan)
        read[T] = check(p, plan, arch, group.precision, seed)
    all_weights = CELLS[group.cell].kernels.gates * group.H**2 * group.dtype.itemsize
    once = 2 * len(group.reverse) * all_weights  # by two batch tiles
    if plan.regime == "streamed":
        assert read == {T: [(T + 1) * once, T * once] for T in (3, 6)}, read
    elif plan.chunks == -(-group.H // plan.block_k):
        assert read == {T: [once, once] for T in (3, 6)}, read
    else:  # once for the registers and, in part, once more for shared memory
        assert read[3] == read[6], read
        assert once < max(read[3]) < 2 * once, read
    what = f"sm_{arch} {group.cell} H={group.H} {group.plan}"
    print(f"{what}: numbers right, no race, weights read as planned", flush=True)


def check_options(name, arch, group, heads=1):
    """A layer with all options at once, lengths, resets and masks, both directions."""
    emulate(arch, seed=1)
    H, B, T, I, D = 24, 9, 4, 8, 2
    cell = CELLS[name] if name in CELLS else getattr(zoo, name)
    torch.manual_seed(3)

    def random(*shape):
        return (torch.randn(shape) * 0.5).to(BF16).double().requires_grad_()

    G, P, k = cell.blocks, len(cell.parameters), heads
    recurrent = (G * H, H) if heads == 1 else (k, G * H // k, H // k)
    weights = []
    for _ in range(D):
        w = random(G * H, I), random(*recurrent), random(G * H), random(G * H), None
        weights.append(Weights(*w, random(P, H) if P else None))
    states = [random(D, B, H), random(D, B, H) if cell.has_c else None]
    zones = [torch.rand(T * B, D * H) < 0.3 for _ in range(2)]
    tensors = OptionTensors(
        torch.tensor([4, 1, 3, 2, 4, 0, 4, 1, 2]),
        torch.rand(T * B) < 0.3,
        random(D, H),
        random(D, H) if cell.has_c else None,
        zones[0],
        zones[1] if cell.has_c else None,
        random(D, B, H).detach(),
    )
    x = random(T * B, I)
    options = Options(zoned=True, clip=0.3, cells=cell.has_c)
    spec = LayerSpec(cell, BatchLayout(T, B), D, H, options=options, heads=heads)
    inputs = LayerInputs(x, *states, tuple(weights), tensors)
    outputs = reference.run(spec, inputs)
    present = [o for o in outputs if o is not None]
    grads = [torch.randn(o.shape).to(BF16).double() for o in present]
    flat = inputs.flatten()
    needs = [t is not None and t.requires_grad for t in flat]
    wanted = [t for t, need in zip(flat, needs, strict=True) if need]
    expected = torch.autograd.grad(present, wanted, grads)

    if group:
        plan = group_plan(Problem(name, BF16, H, B, 1, (False, True)), warps=4)
    else:
        plan = make_plan(products.plan_request(spec, BF16, "ieee"), LIMITS[arch])
    engine = TritonEngine(plan, "ieee")
    cast = inputs.map(lambda t: t.detach().to(BF16) if t.is_floating_point() else t)
    with torch.no_grad():
        found, saved = engine.forward(spec, cast, save=True)
        left = [g.to(BF16) for g in grads]
        given = OutputGrads(*[left.pop(0) if o is not None else None for o in outputs])
        back = engine.backward(spec, cast, found.out, saved, given, Needs.restore(needs)).flatten()
    for got, want in zip([o for o in found if o is not None], present, strict=True):
        assert_close(got, want.detach(), "output", of_largest=TOLERANCE[BF16])
    for got, want in zip([g for g, n in zip(back, needs, strict=True) if n], expected, strict=True):
        assert_close(got, want, "gradient", of_largest=TOLERANCE[BF16])
    what = f"{name}, {heads} heads," if heads > 1 else name
    print(f"sm_{arch} {what} options, {plan.regime}: numbers right, no race", flush=True)


@triton.jit
def arrive_relaxed(counters, step, BLOCK_BARRIER: tl.constexpr):
    """`group.arrive` without its order."""
    tl.atomic_add(counters + (step % 2) * LINE, 1, sem="relaxed", scope="gpu")


@triton.jit
def wait_relaxed(counters, step, programs, BLOCK_BARRIER: tl.constexpr):
    """`group.wait` without its order."""
    target = (step // 2 + 1) * programs
    while tl.atomic_add(counters + (step % 2) * LINE, 0, sem="relaxed", scope="gpu") != target:
        pass
    tl.debug_barrier()


@triton.jit
def arrive_bare(counters, step, BLOCK_BARRIER: tl.constexpr):
    """`group.arrive` without a block barrier of its own."""
    group.arrive(counters, step, False)


@triton.jit
def wait_bare(counters, step, programs, BLOCK_BARRIER: tl.constexpr):
    """`group.wait` without a block barrier of its own."""
    group.wait(counters, step, programs, False)


BARE = {"arrive": arrive_bare, "wait": wait_bare}


def check_wrong(arch):
    """A barrier that does not order memory is a race, even where the numbers come out right.

    Bare atomics are none where the compiler puts block barriers beside them, and only there.
    """
    p = Problem("rnn_tanh", BF16, 40, 9, 3)
    bare = group.needs_block_barriers(gpu_target(arch))
    cases = ({"arrive": arrive_relaxed}, True), ({"wait": wait_relaxed}, True), (BARE, bare)
    for module in KERNELS:
        for functions, expected in cases:
            try:
                check(p, group_plan(p, warps=4), arch, wrong=(module, functions))
                found = False
            except Race:
                found = True
            if found != expected:
                what = f"{', '.join(f.__name__ for f in functions.values())} in {module.__name__}"
                sys.exit(f"{what}: a race was {'found' if found else 'not found'}")
    who = "ours" if bare else "the compiler's"
    print(f"sm_{arch} wrong barriers: races found; block barriers are {who}", flush=True)


if __name__ == "__main__":
    for arch in (80, 90):
        for name in CELLS:
            check_cell(name, arch)
        for case in GROUPS if arch == 80 else GROUPS[::2]:
            check_group(case, arch)
        for name in ("rnn_tanh", "gru", "lstm"):
            for several in (False, True):
                check_options(name, arch, several)
        check_options("peephole_lstm", arch, group=False, heads=2)
        check_options("layer_norm_lstm", arch, group=False, heads=2)
        check_wrong(arch)
