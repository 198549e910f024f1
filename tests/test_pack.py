"""Parameters into the order of the gate buffer, and gradients back, against indexing."""

from itertools import product

import pytest
import torch
from torch import Tensor

from fused_rnn.kernels.pack import pack, unpack

# Of each gate's rows and b_ih, and of its b_hh: LSTM, GRU, a cell of two gates.
SLOTS = {
    "lstm": ((0, 1, 2, 3), (0, 1, 2, 3)),
    "gru": ((0, 1, 2), (0, 1, 3)),
    "two": ((0, 2), (0, 3)),
}
every_cell = pytest.mark.parametrize("cell", SLOTS)
# One unit and one input; units that fill no program; more than one program of either.
every_size = pytest.mark.parametrize(("H", "I"), [(1, 1), (17, 3), (33, 130)])


def by_unit(rows: Tensor, slots: tuple[int, ...]) -> Tensor:
    """[G * H, ...] to [H * 4, ...]."""
    gates = rows.view(len(slots), -1, *rows.shape[1:])
    found = rows.new_zeros(gates.shape[1], 4, *rows.shape[1:])
    for gate, slot in zip(gates, slots, strict=True):
        found[:, slot] = gate
    return found.flatten(0, 1)


@every_cell
@every_size
@pytest.mark.parametrize("biases", [False, True], ids=["no biases", "biases"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_pack(
    cell: str, H: int, I: int, biases: bool, dtype: torch.dtype, triton_device: str
) -> None:
    x_slots, h_slots = SLOTS[cell]
    G = len(x_slots)

    def random(*size: int) -> Tensor:
        return torch.randn(size, dtype=dtype, device=triton_device)

    w, b_ih, b_hh = random(G * H, I), random(G * H + 1)[1:], random(G * H + 1)[1:]  # not aligned
    rows, bias = pack(w, *((b_ih, b_hh) if biases else (None, None)), x_slots, h_slots)
    assert torch.equal(rows, by_unit(w, x_slots))
    if not biases:
        assert bias is None
        return
    assert bias is not None
    expected = by_unit(b_ih.float(), x_slots) + by_unit(b_hh.float(), h_slots)
    rounding = torch.finfo(dtype).eps * expected.abs()  # the interpreter cuts bf16 off
    assert ((bias.float() - expected).abs() <= rounding).all()


@every_cell
@every_size
def test_unpack(cell: str, H: int, I: int, triton_device: str) -> None:
    """Any part of what a direction has; what is frozen has no gradient."""
    x_slots, h_slots = SLOTS[cell]
    G = len(x_slots)
    whole = [torch.randn(G * H, n, device=triton_device) for n in (I, H)]
    bias = torch.randn(H * 4, device=triton_device)
    x_rows, h_rows = by_unit(whole[0], x_slots), by_unit(whole[1], h_slots)
    for has_x, has_h, need_ih, need_hh in product((True, False), repeat=4):
        if not (has_x or has_h or need_ih or need_hh):
            continue
        found = unpack(
            x_rows if has_x else None,
            h_rows if has_h else None,
            bias if need_ih or need_hh else None,
            (need_ih, need_hh),
            x_slots,
            h_slots,
        )
        biases = [by_slots(bias, slots) for slots in (x_slots, h_slots)]
        there = (has_x, has_h, need_ih, need_hh)
        for tensor, expected, here in zip(found, (*whole, *biases), there, strict=True):
            assert (tensor is not None) is here
            assert tensor is None or torch.equal(tensor, expected)


def by_slots(bias: Tensor, slots: tuple[int, ...]) -> Tensor:
    """[H * 4] to [G * H]."""
    return torch.cat([bias.view(-1, 4)[:, slot] for slot in slots])
