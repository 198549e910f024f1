"""The GRU's and LSTM's sweeps on the CPU, chunk by chunk, in blocks of [units, batch].

Time is cut into chunks whose buffers are used again: gates in inference, gate gradients and all
temporaries in the reverse sweep. A training step of the GRU with T, B, I, H = 256, 32, 256, 256
took 264 ms in chunks of 2048 rows, 305 ms in one piece and 291 ms in chunks of 256.
The products with the inputs are made chunk by chunk, too, while their operands are in the cache.
A chunk never spans a change of the batch size: within one, ragged batches are no special case.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_rnn.cpu_gated_cells import GATED_CELLS, GatedCell
from fused_rnn.problem import Layer, Saved, Weights
from fused_rnn.rows import Chunk


@dataclass(frozen=True)
class GatedSweep:
    """The two sweeps of one direction; shapes as in :class:`fused_rnn.problem.Weights`.

    ``x`` [N, I] and ``out`` [N, R] are rows; everything within a chunk is [steps, units, batch].
    """

    layer: Layer
    reverse: bool
    x: Tensor
    h0: Tensor
    c0: Tensor | None
    w: Weights
    out: Tensor

    @property
    def cell(self) -> GatedCell:
        """The cell's formulas."""
        return GATED_CELLS[self.layer.cell.name]

    @property
    def H(self) -> int:
        """Hidden units."""
        return self.w.w_hh.shape[0] // self.layer.cell.gates

    def chunks(self) -> list[Chunk]:
        """In order of time, each about 8 MiB of fp32 gates, but enough for an efficient product."""
        return list(self.layer.rows.chunks(max(1024, 2**21 // (4 * self.H))))

    def forward(self, h_n: Tensor, c_n: Tensor | None, save: bool) -> Saved:
        """Write ``out``, ``h_n`` and ``c_n``.

        Returns:
            with ``save`` the gates and the state (of the GRU h, of the LSTM c) of all steps. With
            ``recompute`` not the gates, nor h, which ``out`` holds
        """
        w, cell, H, R = self.w, self.cell, self.H, self.h0.shape[1]
        chunks = self.chunks()
        longest = max(c.steps * c.batch for c in chunks)
        sizes = self.saved_sizes(self.layer, self.layer.rows.N, H) if save else (None, None)
        save_gates, save_state = (size is not None for size in sizes)
        gates = self.x.new_empty(sizes[0] or longest * 4 * H)
        state = self.x.new_empty(sizes[1] or longest * H)
        scratch = self.x.new_empty(longest * max(w.w_ih.shape[0], R))
        w_ih, w_hh, bias = self._forward_weights()
        h_n.copy_(self.h0)
        if c_n is not None and self.c0 is not None:
            c_n.copy_(self.c0)
        for chunk in reversed(chunks) if self.reverse else chunks:
            n = chunk.batch
            block = _block(gates, chunk.first if save_gates else 0, chunk, 4 * H)
            self._project(chunk, w_ih, bias, block, scratch)
            state_seq = _block(state, chunk.first if save_state else 0, chunk, H)
            # The LSTM's h is not kept: it passes through the scratch memory.
            h_seq = state_seq if c_n is None else _block(scratch, 0, chunk, R)
            views = [h_seq, state_seq, *(block[:, i * H : j * H] for i, j in cell.views)]
            steps = [v.unbind(0) for v in views]
            h = h_n[:n].t().contiguous()
            c = None if c_n is None else c_n[:n].t().contiguous()
            for t in reversed(range(chunk.steps)) if self.reverse else range(chunk.steps):
                h_out, c_out, *rest = (v[t] for v in steps)
                cell.step(w_hh, w.w_hr, h, c, h_out, c_out, *rest)
                h, c = h_out, c_out
            self.out[chunk.span].view(chunk.steps, n, R).copy_(h_seq.transpose(1, 2))
            h_n[:n] = h.t()
            if c_n is not None and c is not None:
                c_n[:n] = c.t()
        return (gates if save_gates else None, state if save_state else None)

    @staticmethod
    def saved_sizes(layer: Layer, N: int, H: int) -> tuple[int | None, ...]:
        """Elements of what ``forward`` saves of ``N`` rows, None for what it does not."""
        gates = None if layer.recompute else N * 4 * H
        return gates, N * H if layer.cell.has_c or gates is not None else None

    def _forward_weights(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """w_ih, w_hh and the bias as the gate buffer wants them."""
        cell, w = self.cell, self.w
        w_hh = cell.scale(w.w_hh)
        w_hh = w_hh.roll(cell.roll * self.H, dims=0) if cell.roll else w_hh
        return cell.scale(w.w_ih), w_hh, cell.bias(w)

    def _project(
        self, chunk: Chunk, w_ih: Tensor, bias: Tensor | None, block: Tensor, scratch: Tensor
    ) -> None:
        """Fill ``block`` [steps, 4*H, n] with what the recurrent product adds to."""
        skip = self.cell.x[0] * self.H  # gates that the input does not enter
        product = block if skip == 0 else _block(scratch, 0, chunk, w_ih.shape[0])
        x = self.x[chunk.span]
        if chunk.batch == 1:  # then rows and columns lie alike, and one product serves all steps
            torch.mm(x, w_ih.t(), out=product.view(chunk.steps, -1))
        else:
            x_t = x.view(chunk.steps, chunk.batch, -1).transpose(1, 2)
            torch.bmm(w_ih.expand(chunk.steps, *w_ih.shape), x_t, out=product)
        if skip:
            block[:, :skip] = 0 if bias is None else bias[:skip, None]
        if bias is not None:
            torch.add(product, bias[skip:, None], out=block[:, skip:])
        elif skip:
            block[:, skip:] = product

    def backward(
        self,
        saved: Saved,
        dout: Tensor | None,
        dh0: Tensor,
        dc0: Tensor | None,
        dx: Tensor | None,
        needs: tuple[bool, ...],
    ) -> Saved:
        """Back-propagation through time; returns the gradients of the weights.

        ``dh0`` and ``dc0`` come as the gradients of the final states and leave as those of the
        initial ones: a sequence that ends early (in the reverse direction: begins late) keeps its
        row untouched until the sweep reaches it. ``dx`` is written, or added to in reverse.
        """
        w, cell, H, R = self.w, self.cell, self.H, self.h0.shape[1]
        gates, state = saved
        chunks = self.chunks()
        longest = max(c.steps * c.batch for c in chunks)
        w_hh = w.w_hh.roll(cell.roll * H, dims=0) if cell.roll else w.w_hh
        w_t = w_hh.t().contiguous()
        buffers = self.x.new_empty(2, longest * 4 * H)
        dw: list[Tensor | None] = [
            torch.zeros_like(p) if need and p is not None else None
            for p, need in zip(w, needs, strict=True)
        ]
        dw_ih, dw_hh, db_ih, db_hh, dw_hr = dw
        for k in range(len(chunks)) if self.reverse else reversed(range(len(chunks))):
            chunk = chunks[k]
            block = _block(buffers[0], 0, chunk, 4 * H)
            dout_t = None
            if dout is not None:
                dout_t = _block(buffers[1], 0, chunk, R)
                dout_t.copy_(_transposed(dout[chunk.span], chunk))
            h_prev = self._h_prev(chunks, k)
            if gates is None:
                activated = self._rebuild(chunk, h_prev)
            else:
                activated = _block(gates, chunk.first, chunk, 4 * H)
            if state is None:
                states = _transposed(self.out[chunk.span], chunk), _transposed(h_prev, chunk)
            else:
                states = _block(state, chunk.first, chunk, H), self._state_prev(chunks, k, state)
            self._sweep(chunk, block, activated, states, dout_t, dh0, dc0, w_t, dw_hr)
            # Rows of gates, columns of (step, sequence): the operand of all three products.
            flat = buffers[1, : block.numel()].view(4 * H, chunk.steps * chunk.batch)
            flat.view(4 * H, chunk.steps, chunk.batch).copy_(block.transpose(0, 1))
            dgx, dgh = flat[cell.x[0] * H : cell.x[1] * H], flat[cell.h[0] * H : cell.h[1] * H]
            if dx is not None:
                mine = dx[chunk.span]
                torch.addmm(mine, dgx.t(), w.w_ih, beta=int(self.reverse), out=mine)
            if dw_ih is not None:
                dw_ih.addmm_(dgx, self.x[chunk.span])
            if dw_hh is not None:
                dw_hh.addmm_(dgh, h_prev)
            if db_ih is not None:
                db_ih += dgx.sum(1)
            if db_hh is not None:
                db_hh += dgh.sum(1)
        if cell.roll:
            dw_hh = None if dw_hh is None else dw_hh.roll(-cell.roll * H, dims=0)
            db_hh = None if db_hh is None else db_hh.roll(-cell.roll * H)
        return dw_ih, dw_hh, db_ih, db_hh, dw_hr

    def _sweep(
        self,
        chunk: Chunk,
        block: Tensor,
        activated: Tensor,
        states: tuple[Tensor, Tensor],
        dout: Tensor | None,
        dh0: Tensor,
        dc0: Tensor | None,
        w_t: Tensor,
        dw_hr: Tensor | None,
    ) -> None:
        """The steps of a chunk, from its gates and the states after and before each step.

        Fills ``block`` [steps, 4*H, n] with gate gradients, updates ``dh0`` and ``dc0``, and adds
        to ``dw_hr``.
        """
        cell, H, w_hr = self.cell, self.H, self.w.w_hr
        shape = (chunk.steps, 4, H, chunk.batch)
        dgates, activated = block.view(shape), activated.view(shape)
        coefficients = cell.coefficients(*states, activated, dgates)
        recurrent = block[:, cell.h[0] * H : cell.h[1] * H]
        steps = [v.unbind(0) for v in (dgates, recurrent, *coefficients)]
        douts = None if dout is None else dout.unbind(0)
        dh = dh0[: chunk.batch].t().contiguous()
        dc = None if dc0 is None else dc0[: chunk.batch].t().contiguous()
        totals = [dh] * chunk.steps
        for t in range(chunk.steps) if self.reverse else reversed(range(chunk.steps)):
            total = dh if douts is None else torch.add(dh, douts[t])
            if w_hr is not None:
                totals[t] = total.clone()
                total = torch.mm(w_hr.t(), total)
            cell.adjoint(total, dh, dc, w_t, *(v[t] for v in steps))
        dh0[: chunk.batch] = dh.t()
        if dc0 is not None and dc is not None:
            dc0[: chunk.batch] = dc.t()
        if dw_hr is not None:
            unprojected = torch.tanh(states[0]).mul_(activated[:, 3])
            dw_hr += torch.einsum("trn,thn->rh", torch.stack(totals), unprojected)

    def _rebuild(self, chunk: Chunk, h_prev: Tensor) -> Tensor:
        """The gates of a chunk once more: every h is known, so one product does for all steps."""
        w_ih, w_hh, bias = self._forward_weights()
        size, H = chunk.steps * chunk.batch, self.H
        block = _block(self.x.new_empty(size * 4 * H), 0, chunk, 4 * H)
        self._project(chunk, w_ih, bias, block, self.x.new_empty(size * w_ih.shape[0]))
        i, j = self.cell.h
        w_all = w_hh.expand(chunk.steps, *w_hh.shape)
        block[:, i * H : j * H] += torch.bmm(w_all, _transposed(h_prev, chunk))
        self.cell.activate(*(block[:, i * H : j * H] for i, j in self.cell.views))
        return block

    def _before(self, k: int) -> int:
        """The chunk that the forward sweep ran through before chunk ``k``."""
        return k + 1 if self.reverse else k - 1

    def _h_prev(self, chunks: list[Chunk], k: int) -> Tensor:
        """The rows of h [steps * n, R] that the steps of chunk ``k`` started from."""
        chunk, n = chunks[k], chunks[k].batch
        before, out = self._before(k), self.out
        if not 0 <= before < len(chunks):
            entry = self.h0[:n]
        else:
            m = chunks[before].batch
            if n == m:  # the rows lie side by side: no copy
                shift = n if self.reverse else -n
                return out[chunk.span.start + shift : chunk.span.stop + shift]
            first = chunks[before].first if self.reverse else chunk.first - m
            entry = torch.cat([out[first : first + min(m, n)], self.h0[m:n]])
        mine = out[chunk.span]
        return torch.cat([mine[n:], entry] if self.reverse else [entry, mine[:-n]])

    def _state_prev(self, chunks: list[Chunk], k: int, state: Tensor) -> Tensor:
        """The state [steps, H, n] (of the GRU h, of the LSTM c) that they started from."""
        initial = self.h0 if self.c0 is None else self.c0
        n, before = chunks[k].batch, self._before(k)
        if not 0 <= before < len(chunks):
            entry = initial[:n].t()
        else:
            last = _block(state, chunks[before].first, chunks[before], self.H)
            entry = last[0 if self.reverse else -1][:, :n]
            entry = torch.cat([entry, initial[entry.shape[1] : n].t()], dim=1)
        mine = _block(state, chunks[k].first, chunks[k], self.H)
        return torch.cat([mine[1:], entry[None]] if self.reverse else [entry[None], mine[:-1]])


def _transposed(rows: Tensor, chunk: Chunk) -> Tensor:
    """Rows [steps * batch, R] seen as [steps, R, batch]."""
    return rows.view(chunk.steps, chunk.batch, -1).transpose(1, 2)


def _block(buffer: Tensor, first: int, chunk: Chunk, width: int) -> Tensor:
    """The chunk's [steps, width, batch] of a flat buffer whose rows start at row ``first``."""
    start, shape = first * width, (chunk.steps, width, chunk.batch)
    return buffer[start : start + chunk.steps * width * chunk.batch].view(shape)
