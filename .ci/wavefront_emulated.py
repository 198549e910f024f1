"""Stacks whose layers overlap, by compiled kernels in an emulated GPU beside this checkout.

In any order that streams and events allow they return the same bits, and these are right.
"""

import copy
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT.parent / "shared")]
warnings.simplefilter("ignore")

import fakegpu  # noqa: E402

fakegpu.install("emulate")

import torch  # noqa: E402
from helpers import assert_close, packer, run, sequences, states, twins  # noqa: E402
from wavefront_helpers import overlapping  # noqa: E402

from fused_rnn.engines.triton import plans  # noqa: E402
from fused_rnn.kernels.planner import plans as all_plans  # noqa: E402

# TF32, where it is fp32.
LARGEST = {torch.float32: 2e-3, torch.bfloat16: 3e-2, torch.float16: 4e-3}
CASES = [  # kind, dtype, H, B, packed, with lengths and resets, a group, orders
    ("lstm", torch.bfloat16, 40, 8, False, False, True, 20),
    ("gru", torch.float16, 40, 8, True, False, True, 3),
    ("tanh", torch.float32, 40, 4, False, False, True, 3),
    ("lstm", torch.bfloat16, 40, 8, False, True, True, 3),
    ("lstm", torch.float16, 16, 8, True, False, False, 3),
    ("gru", torch.bfloat16, 16, 8, False, True, False, 3),
]


def check(
    kind: str,
    dtype: torch.dtype,
    H: int,
    B: int,
    packed: bool,
    options: bool,
    group: bool,
    orders: int,
) -> None:
    """One stack against fp64, and in so many orders against the first."""
    torch.manual_seed(0)
    exact, fused = twins(kind, 8, H, num_layers=3, backend="triton", dtype=dtype)
    call = {}
    if options:
        exact = copy.deepcopy(fused)
        exact.backend = "eager"
        lengths = torch.tensor([7 - b % 7 for b in range(B)])
        call = {"lengths": lengths, "reset": torch.rand(7, B) < 0.2}
    if packed:
        xs, make = sequences([max(1, 7 - b) for b in range(B)], 8, dtype), packer(True)
    else:
        xs, make = [torch.randn(7, B, 8, dtype=dtype)], lambda xs: xs[0]
    initial = states(fused, B)
    wide = [x.double() for x in xs], [h.double() for h in initial]
    expected = run(exact.double(), *wide, make, **call)

    def chooser(request, limits):
        return next(p for p in all_plans(request, limits) if (p.programs > 1) == group)

    first = None
    with plans.forced(chooser):
        for seed in range(orders):
            with overlapping(steps=2, seed=seed) as cut:
                found = run(fused, xs, initial, make, **call)
                with torch.no_grad():
                    again = run(fused, xs, initial, make, gradients=False, **call)
            assert cut == [3, 3]
            first = first or found
            for name, value in first.items():
                assert torch.equal(found[name], value), f"{name} depends on the order"
            for name, value in again.items():
                assert torch.equal(first[name], value), f"{name} of an inference differs"
    for name, value in expected.items():
        assert_close(first[name], value, name, dtype, of_largest=LARGEST[dtype])
    batch = "packed" if packed else "lengths and resets" if options else "uniform"
    print(f"{kind} {dtype} H={H} {batch}: {orders} orders", flush=True)


if __name__ == "__main__":
    for case in CASES:
        check(*case)
