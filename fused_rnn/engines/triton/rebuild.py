"""The gates a second time, for layers with ``recompute=True``, which saved only their states."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_rnn.engines.triton.products import by_head, kernel_cell, operand_of, project
from fused_rnn.spec.layer import LayerInputs, LayerSpec
from fused_rnn.spec.options import resets


def rebuild_gates(
    spec: LayerSpec,
    inputs: LayerInputs,
    out: Tensor,
    c_seq: Tensor | None,
    operand: Tensor | None,
) -> Tensor:
    """What the forward sweep would have saved: h of every step is known, so one product does.

    Args:
        spec: the layer.
        inputs: its tensors.
        out: [N, D*H].
        c_seq: the states beside h after every step [N, D*K*H], or None for a cell of one state.
        operand: [N, D*H], what the recurrent product took, where that is not h0 and ``out``.

    Returns:
        the gate buffer [D*k, N, H/k, S]
    """
    x, k, cell = inputs.x, spec.heads, kernel_cell(spec)
    gates = project(spec, x, inputs.weights)
    H = spec.hidden_size // k
    for d, w in enumerate(inputs.weights):
        buffer = gates[d * k : (d + 1) * k]
        before = operand_of(spec, inputs, out, operand, d)
        rows = buffer.view(k, x.shape[0], -1)
        w_hh = _rows_by_unit(spec, w.w_hh)
        if k == 1:
            rows[0].addmm_(before, w_hh[0].t())
        else:
            rows.baddbmm_(by_head(spec, before), w_hh.transpose(1, 2))
        for head in range(k):
            units = slice(head * H, (head + 1) * H)
            states = StatesBefore(spec, inputs, out, c_seq, d, units)
            vectors = None if w.vectors is None else w.vectors[:, units]
            cell.activate(buffer[head], states, vectors)
    return gates


def _rows_by_unit(spec: LayerSpec, w_hh: Tensor) -> Tensor:
    """The recurrent weights of each head in the order of the gate buffer, [k, H/k * S, H/k]."""
    from fused_rnn.kernels.pack import pack

    cell, k = kernel_cell(spec), spec.heads
    if cell.slots == 1:
        return w_hh.view(k, -1, w_hh.shape[-1])
    if k == 1:
        return pack(w_hh, None, None, cell.h_slots, cell.h_slots)[0].unsqueeze(0)
    H = spec.hidden_size // k
    rows = w_hh.new_zeros(k, H, cell.slots, H)
    for slot, gate in zip(cell.h_slots, w_hh.view(k, -1, H, H).unbind(1), strict=True):
        rows[:, :, slot] = gate
    return rows.flatten(1, 2)


class StatesBefore(Sequence[Tensor]):
    """The states [N, units] before each row's step, h first; each made when it is asked for."""

    def __init__(
        self,
        spec: LayerSpec,
        inputs: LayerInputs,
        out: Tensor,
        c_seq: Tensor | None,
        d: int,
        units: slice,
    ) -> None:
        self.spec, self.inputs, self.d, self.units = spec, inputs, d, units
        self.after = out, c_seq

    def __len__(self) -> int:
        return kernel_cell(self.spec).states

    def __getitem__(self, i: int) -> Tensor:  # type: ignore[override]
        if not 0 <= i < len(self):
            raise IndexError(i)
        (_, h0, c0, _, options), d = self.inputs, self.d
        initial, restart, after = (h0, options.restart_h, self.after[0])
        if i > 0:
            initial, restart, after = (c0, options.restart_c, self.after[1])  # type: ignore[assignment]
        first = max(0, i - 1) * self.spec.hidden_size  # of the states beside h, side by side
        units = slice(first + self.units.start, first + self.units.stop)
        last = after[:, d * initial.shape[-1] :][:, units]
        begin = initial[d][:, units].to(last.dtype)
        before = self.spec.layout.previous(last, begin, d == 1)
        if options.lengths is not None and d == 1:  # what lies behind a sequence's end is no state
            step = torch.arange(self.spec.layout.T, device=last.device)[:, None]
            ends = (step == options.lengths.clamp(0, self.spec.layout.T) - 1).view(-1, 1)
            before = torch.where(ends, begin.repeat(self.spec.layout.T, 1), before)
        reset = resets(self.spec, options)
        if reset is not None:
            anew = last.new_zeros(()) if restart is None else restart[d][units].to(last.dtype)
            before = torch.where(reset[d][:, None], anew, before)
        return before
