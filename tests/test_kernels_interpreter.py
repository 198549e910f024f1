"""The two sweep kernels in Triton's interpreter, against the eager formulas in fp64."""

from dataclasses import replace

import pytest
import torch
import triton
from helpers import plan_request
from sweep_oracle import CELLS, LENGTHS, Problem, check_sweeps

from fused_rnn.kernels.chips import LIMITS
from fused_rnn.kernels.plan import DoesNotFit
from fused_rnn.kernels.planner import make_plan

if not triton.knobs.runtime.interpret:
    pytest.skip("Triton was imported without TRITON_INTERPRET=1", allow_module_level=True)


def run(p: Problem, target=80, use_c_seq=False):
    request = plan_request(p.name, p.H, p.dtype, p.layout.B, len(p.reverse), fast=False)
    plan = make_plan(request, replace(LIMITS[target], groups=False))
    check_sweeps(p, plan, "ieee", use_c_seq)


# Every H with every cell and dtype; B, T and the layout take turns so that each meets each H.
HS = (1, 2, 7, 16, 33, 64, 65, 100, 128)
BTS = ((1, 1), (3, 7), (8, 2), (17, 2), (3, 1), (1, 7), (8, 7), (17, 1))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _id(x):
    return str(x).removeprefix("torch.")


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
@pytest.mark.parametrize("H", HS)
def test_sizes(name, dtype, H):
    turn = HS.index(H) * 3 + DTYPES.index(dtype) + list(CELLS).index(name)
    B, T = BTS[turn % len(BTS)]
    try:
        make_plan(plan_request(name, H, dtype, B), replace(LIMITS[80], groups=False))
    except DoesNotFit:
        pytest.skip("beyond one program's registers")
    run(Problem(name, dtype, H, B, T, reverse=(turn % 2 == 1,)))


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("B", LENGTHS)
@pytest.mark.parametrize("reverse", [(False,), (True,), (False, True)], ids=["f", "r", "fr"])
def test_packed(name, B, reverse):
    run(Problem(name, torch.float32, 7, B, 0, reverse, packed=True), use_c_seq=True)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
def test_bidirectional(name, dtype):
    run(Problem(name, dtype, 16, 3, 4, (False, True)), use_c_seq=True)


@pytest.mark.parametrize("name", CELLS)
def test_batched_dot(name):
    """The form of the product that sm_90 and sm_100 take with 16-bit weights."""
    assert make_plan(plan_request(name, 40, 2, 9), LIMITS[90]).m_split > 1
    run(Problem(name, torch.float16, 40, 9, 3), target=90)
