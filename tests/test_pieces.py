"""How stacks are cut into pieces, and that all that is under way has room on the chip."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import all_plans, dtypes

import fused_rnn
from fused_rnn.cells.builtin import CELLS
from fused_rnn.kernels import pieces
from fused_rnn.kernels.chips import LIMITS
from fused_rnn.spec.batch import BatchLayout


@settings(max_examples=200)
@given(
    cell=st.sampled_from(list(CELLS)),
    dtype=dtypes,
    H=st.integers(1, 2048),
    B=st.integers(1, 300),
    layers=st.integers(2, 12),
    T=st.integers(1, 3000),
    target=st.sampled_from([t for t in LIMITS if isinstance(t, int)]),
    captured=st.booleans(),
)
def test_all_programs_under_way_are_resident(
    cell: str, dtype: str, H: int, B: int, layers: int, T: int, target: int, captured: bool
) -> None:
    """So no group holds places that another one waits for, however the driver hands them out."""
    limits = LIMITS[target]
    plan = all_plans(cell, dtype, H, B, 1, limits)[0]
    request = fused_rnn.kernels.plan.PlanRequest(CELLS[cell].kernels, H, torch.bfloat16, B, 1)
    cuts = pieces.cut_stack(request, plan, layers, T, limits, captured=captured)
    for cut in cuts:
        assert cut is not None
        assert (cut.pieces - 1) * cut.steps < T <= cut.pieces * cut.steps
        assert cut.pieces == 1 or cut.steps % pieces.GRAIN == 0
        if cut.pieces > 1:
            launches = list(plan.launches(B, 1))
            programs = [plan.programs * tiles * ds for _, tiles, _, ds in launches]
            by_registers = 65536 // (plan.warps * 32 * 256)
            by_shared = limits.sm_shared // (plan.shared + 1024)
            places = limits.sms * min(by_registers, by_shared)
            assert len(programs) == 1
            assert 1 < cut.streams <= layers
            assert cut.streams * programs[0] <= places


def test_more_pieces_where_a_graph_spares_the_host() -> None:
    (plan,) = all_plans("lstm", "bf16", 512, 8, 1, LIMITS[90])[:1]
    request = fused_rnn.kernels.plan.PlanRequest(CELLS["lstm"].kernels, 512, torch.bfloat16, 8, 1)
    called = pieces.cut_stack(request, plan, 4, 1024, LIMITS[90])
    captured = pieces.cut_stack(request, plan, 4, 1024, LIMITS[90], captured=True)
    assert captured.forward.pieces > called.forward.pieces > 1
    assert pieces.stack_us(4, 256, 1, 4, 2.0) == 4 * 256 * 2
    assert pieces.stack_us(4, 256, 4, 4, 2.0) == 7 * (64 * 2 + pieces.PIECE_US)
    assert pieces.stack_us(4, 256, 4, 2, 2.0) == 9 * (64 * 2 + pieces.PIECE_US)


def test_pieces_of_a_layout() -> None:
    uniform = BatchLayout(5, 3).pieces(2)
    assert [(row, p.T, p.B, p.N) for row, p in uniform] == [
        (0, 2, 3, 6),
        (6, 2, 3, 6),
        (12, 1, 3, 3),
    ]
    packed = BatchLayout.packed(torch.tensor([4, 3, 3, 1, 1]))
    parts = packed.pieces(2)
    assert [(row, p.T, p.B, p.batch_sizes) for row, p in parts] == [
        (0, 2, 4, (4, 3)),
        (7, 2, 3, (3, 1)),
        (11, 1, 1, (1,)),
    ]
    cpu = torch.device("cpu")
    packed.offsets_at_once([p for _, p in parts], cpu)
    offsets = [p.offsets(cpu) for _, p in parts]
    assert [None if o is None else o.tolist() for o in offsets] == [[0, 4, 7], [0, 3, 4], [0, 1]]
    assert all(o is not None and o.storage_offset() % 2 == 0 for o in offsets)
