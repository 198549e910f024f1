"""Which row comes before which: the index tensors against a loop over steps and sequences."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_sequence

from fused_rnn.spec.batch import BatchLayout

lengths = st.lists(st.integers(1, 6), min_size=1, max_size=12).map(lambda n: sorted(n)[::-1])


@given(lengths=lengths, reverse=st.booleans())
def test_previous_and_last(lengths: list[int], reverse: bool) -> None:
    packed = pack_sequence([torch.zeros(n) for n in lengths])
    rows = BatchLayout.packed(packed.batch_sizes)
    assert (lengths[0], len(lengths), sum(lengths)) == (rows.T, rows.B, rows.N)
    first = [0, *packed.batch_sizes.cumsum(0).tolist()]
    state = torch.arange(1.0, rows.N + 1)[:, None]
    initial = -torch.arange(1.0, rows.B + 1)[:, None]
    previous, last = torch.empty_like(state), torch.empty_like(initial)
    for b, length in enumerate(lengths):
        before = initial[b]
        for t in reversed(range(length)) if reverse else range(length):
            previous[first[t] + b] = before
            before = state[first[t] + b]
        last[b] = before
    assert torch.equal(rows.previous(state, initial, reverse), previous)
    assert torch.equal(rows.last(state, reverse), last)
    dgates = torch.arange(2.0 * rows.N).view(rows.N, 2)
    product = rows.recurrent_product(dgates, state, initial, reverse, from_zero=False)
    torch.testing.assert_close(product, dgates.t() @ previous)
