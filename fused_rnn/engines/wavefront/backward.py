"""Backward through a stack: from the top layer and the last piece of time to the first of each.

A layer goes back through a piece once the layer above has, and the product with its input weights
is there. What a piece adds to the gradients of the parameters is summed up in fp32, so that its
gate gradients can be forgotten: there is memory for those of two pieces of each layer.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_rnn.engines.triton.engine import device_and_precision
from fused_rnn.engines.triton.products import (
    accumulate,
    by_unit,
    contiguous,
    kernel_cell,
    own_vectors,
    parameter_gradients,
    recurrent_weights,
)
from fused_rnn.engines.wavefront.stack import (
    Piece,
    Rows,
    SavedLayer,
    StackLayer,
    Wavefront,
    carried,
    cut_into_pieces,
    part,
    piece_options,
)
from fused_rnn.engines.wavefront.streams import Event, Streams
from fused_rnn.kernels.launch import Launch, LaunchRefused, launch, zero_counters
from fused_rnn.kernels.sweep import Gradients, SweepOptions
from fused_rnn.kernels.sweeps import partials_memory, prepare_reverse
from fused_rnn.spec.layer import Engine, InputGrads, Needs, OutputGrads, WeightGrads

NO_GRADIENTS = InputGrads(None, None, None, (WeightGrads(),))


def backward(
    wave: Wavefront,
    layers: Sequence[StackLayer],
    saved: Sequence[SavedLayer],
    grads: OutputGrads,
    needs: Sequence[Needs],
) -> list[InputGrads]:
    """The gradients of each layer's inputs that are needed; of x, that of the first layer.

    Args:
        wave: how the stack runs.
        layers: as they were given to forward.
        saved: what that returned.
        grads: of out [N, H], h_n [L, B, H] and c_n [L, B, K * H].
        needs: of each layer.
    """
    try:
        return _overlapping(wave, layers, saved, grads, needs)
    except LaunchRefused:  # the driver takes fewer programs now: the engine looks for such a plan
        return one_by_one(wave, wave.engine, layers, saved, grads, needs)


def one_by_one(
    wave: Wavefront,
    engine: Engine,
    layers: Sequence[StackLayer],
    saved: Sequence[SavedLayer],
    grads: OutputGrads,
    needs: Sequence[Needs],
) -> list[InputGrads]:
    """The same by an engine's backward of each layer."""

    def of_engine(n: int, grad: OutputGrads, need: Needs) -> InputGrads:
        (spec, inputs), (x, out, gates, c_seq, _, operand) = layers[n], saved[n]
        assert x is not None
        assert out is not None
        if gates is not None:
            gates = gates.view(1, spec.layout.N, spec.hidden_size, -1)
        kept = gates, c_seq, operand
        return engine.backward(spec, inputs._replace(x=x), out, kept, grad, need)

    def dropped(dout: Tensor, n: int) -> Tensor:
        mask = saved[n].mask
        return dout if mask is None else dout * mask * wave.scale

    return top_down(of_engine, dropped, grads, needs)


def top_down(
    layer_backward: Callable[[int, OutputGrads, Needs], InputGrads],
    dropped: Callable[[Tensor, int], Tensor],
    grads: OutputGrads,
    needs: Sequence[Needs],
) -> list[InputGrads]:
    """The gradients of a stack, layer by layer.

    Args:
        layer_backward: of a layer's number, the gradients of its outputs, and which are needed.
        dropped: of the gradient behind dropout and the number of the layer before it.
        grads: of out [N, H], h_n [L, B, H] and c_n [L, B, K * H].
        needs: of each layer.
    """
    lowest, dout = first_needed(needs), grads.out
    found = [NO_GRADIENTS] * len(needs)
    for n in range(len(needs) - 1, lowest - 1, -1):
        states = [None if g is None else g[n : n + 1] for g in (grads.h_n, grads.c_n)]
        need = needs[n]._replace(x=n > lowest or needs[n].x)
        computed = layer_backward(n, OutputGrads(dout, *states), need)
        dout = computed.x
        if n > lowest and dout is not None:
            dout = dropped(dout, n - 1)
        found[n] = computed._replace(x=dout if n == 0 else None)
    return found


def _overlapping(
    wave: Wavefront,
    layers: Sequence[StackLayer],
    saved: Sequence[SavedLayer],
    grads: OutputGrads,
    needs: Sequence[Needs],
) -> list[InputGrads]:
    """Those of :func:`backward`, if no launch is refused."""
    layers = [StackLayer(spec, contiguous(inputs)) for spec, inputs in layers]
    x, H, last = layers[0].inputs.x, layers[0].spec.hidden_size, len(layers) - 1
    lowest, cut = first_needed(needs), wave.cuts.reverse
    assert cut is not None
    with device_and_precision(x, wave.engine.precision):
        pieces = cut_into_pieces(layers[0].spec.layout, cut, x.device)
        dh = _last_states(layers[0].inputs.h0, grads.h_n, len(layers))
        dc = _last_states(layers[0].inputs.c0, grads.c_n, len(layers))
        dout = None if grads.out is None else Rows(pieces, grads.out.contiguous(), H, x)
        options = piece_options(layers, pieces)
        stack: dict[int, _Layer] = {}
        for n in range(last, lowest - 1, -1):
            how = pieces, options[n], (dh[n], dc[n]), dout, needs[n]
            stack[n] = _Layer(wave, layers[n], saved[n], *how)
            dout = Rows(pieces, None, H, x) if n > lowest else None
        dx = torch.empty_like(x) if needs[0].x else None
        bottom = None if dx is None else Rows(pieces, dx, x.shape[1], x)
        with Streams(x.device, cut.streams) as streams:
            _run(stack, pieces[::-1], bottom, streams, cut.streams)
        return [NO_GRADIENTS] * lowest + [
            stack[n].gradients(dx if n == 0 else None) for n in sorted(stack)
        ]


def first_needed(needs: Sequence[Needs]) -> int:
    """The lowest layer of which a gradient is needed; as many as there are for none."""
    return next((n for n, need in enumerate(needs) if any(need.flatten())), len(needs))


def _last_states(like: Tensor | None, grad: Tensor | None, layers: int) -> list[Any]:
    """The gradients of the final states of each layer in fp32, to be overwritten."""
    if like is None:
        return [None] * layers
    states, each = carried(layers, like)
    if grad is None:
        states.zero_()
    else:
        states.copy_(grad)
    return each


def _each_piece(like: Tensor | None, pieces: Sequence[Piece]) -> list[Any]:
    """Memory in fp32 for what each piece finds, as ``like``; if that is None, for nothing."""
    return [None] * len(pieces) if like is None else carried(len(pieces), like)[1]


def _run(
    stack: "dict[int, _Layer]",
    pieces: Sequence[Piece],
    bottom: Rows | None,
    streams: Streams,
    count: int,
) -> None:
    """All launches and products: in each front the sweeps, what others wait for, and the rest."""
    top, lowest = max(stack), min(stack)
    start = streams.run(None, None)
    ready = {(top, piece.number): start for piece in pieces}
    done: dict[tuple[int, int], Event] = {}
    free: dict[tuple[int, int], Event] = {}

    def sweep(n: int, piece: Piece) -> Callable[[], None]:
        return lambda: stack[n].run(piece)

    def pass_down(n: int, piece: Piece) -> Callable[[], None] | None:
        if n > lowest:
            below = stack[n - 1]
            assert below.dout is not None
            to, mask = below.dout[piece], part(below.mask, piece)
            return lambda: stack[n].pass_down(piece, to, mask)
        if bottom is None:
            return None
        return lambda: stack[n].pass_down(piece, bottom[piece], None)

    def weigh(n: int, piece: Piece) -> Callable[[], None]:
        return lambda: stack[n].weigh(piece)

    for front in range(len(stack) + len(pieces) - 1):
        places = [(n, front - (top - n)) for n in stack]
        wave = [(n, pieces[q]) for n, q in places if 0 <= q < len(pieces)]
        for n, piece in wave:  # the memory of its gate gradients was that of two pieces ago
            p = piece.number
            after = [ready[n, p], *[free[key] for key in [(n, p + 2)] if key in free]]
            done[n, p] = streams.run(sweep(n, piece), n % count, *after)
        for n, piece in wave:  # so was that of what it passes down
            p = piece.number
            after = [done[key] for key in ((n, p), (n - 1, p + 2)) if key in done]
            ready[n - 1, p] = streams.run(pass_down(n, piece), None, *after)
        for n, piece in wave:
            free[n, piece.number] = streams.run(weigh(n, piece), None)


class _Layer:
    """One layer on its way back through time: its memory, its sweeps and its products."""

    def __init__(
        self,
        wave: Wavefront,
        layer: StackLayer,
        saved: SavedLayer,
        pieces: Sequence[Piece],
        options: Sequence[SweepOptions],
        states: tuple[Tensor, Tensor | None],
        dout: Rows | None,
        needs: Needs,
    ) -> None:
        self.wave, (self.spec, self.inputs), self.needs = wave, layer, needs
        self.dh, self.dc = states  # from piece to piece, each of which overwrites them
        self.dout, self.pieces, self.options = dout, pieces, options
        plan, cell, H = wave.engine.plan, kernel_cell(self.spec), self.spec.hidden_size
        x, like = saved.x, saved.out
        assert x is not None
        assert like is not None

        def rows(whole: Tensor | None) -> Rows | None:
            return None if whole is None else Rows(pieces, whole, whole.shape[1], like)

        self.x, self.out = Rows(pieces, x, 0, like), Rows(pieces, like, H, like)
        self.gates, self.c_seq, self.mask = rows(saved.gates), rows(saved.c_seq), rows(saved.mask)
        self.operand = rows(saved.operand)
        self.dgates = Rows(pieces, None, H * cell.slots, like)
        weights = self.inputs.weights
        self.w_ih, _ = by_unit(self.spec, weights[0], biases=False)
        h0, c0 = self.inputs.h0, self.inputs.c0
        self.first = h0.to(like.dtype), None if c0 is None else c0.to(torch.float32)
        self.w_hh, self.vectors = recurrent_weights(self.spec, weights), own_vectors(weights)
        self.partials = partials_memory(plan, self.spec.layout.B, 1, like)
        self.launched: Launch | None = None
        self.kernel: Any = None
        self.counters: Sequence[Tensor] | None = None
        if self.partials is not None:
            B = self.spec.layout.B
            self.counters = zero_counters(plan, B, 1, like.device, len(pieces)).unbind()

        def zeros(wanted: bool, *shape: int) -> Tensor | None:
            return like.new_zeros(shape, dtype=torch.float32) if wanted else None

        need, slots, P = needs.weights[0], H * cell.slots, cell.parameters
        self.dw_ih = zeros(need.w_ih, slots, x.shape[1])
        self.dw_hh = zeros(need.w_hh, slots, H)
        self.db = zeros(need.b_ih or need.b_hh, len(pieces), slots)
        tiles = -(-self.spec.layout.B // plan.block_b)
        self.dvectors = zeros(P > 0, len(pieces), tiles, P, H)
        # Of the states with which segments begin, one of each piece.
        restarted = options[0].reset is not None and (needs.restart_h or needs.restart_c)
        self.drestart_h = _each_piece(self.inputs.h0 if restarted else None, pieces)
        self.drestart_c = _each_piece(c0 if restarted else None, pieces)

    def run(self, piece: Piece) -> None:
        """The reverse sweep through a piece."""
        layout, p, out = piece.layout, piece.number, self.out[piece]
        gates, c_seq, dgates = part(self.gates, piece), part(self.c_seq, piece), self.dgates[piece]
        dout, (h, c) = part(self.dout, piece), self.before(piece)
        counters = None if self.counters is None else self.counters[p]
        dvectors = None if self.dvectors is None else self.dvectors[p]
        restarts = self.drestart_h[p], self.drestart_c[p]
        options = self.options[p]
        if options.lengths is not None:  # a sweep leaves out steps beyond a sequence's end
            dgates.zero_()
        if self.launched is not None and self.kernel is not None:
            other = {"gates": gates, "out": out, "c_seq": c_seq, "h0": h, "c0": c, "dout": dout}
            other |= {"dgates": dgates, "dvectors": dvectors, "counters": counters}
            other |= {"offsets": layout.offsets(out.device)}
            other |= {"lengths": options.lengths, "reset": options.reset}
            other |= {"drestart_h": restarts[0], "drestart_c": restarts[1]}
            known = self.launched.tensors
            other = {name: t for name, t in other.items() if known[name] is not None}
            self.launched.again(self.kernel, other, layout.T, layout.B)
            return
        sweep = self.wave.sweep(self.spec, piece, options, out)
        shape = 1, layout.N, self.spec.hidden_size, sweep.cell.slots
        self.launched, _ = prepare_reverse(
            sweep,
            *(None if gates is None else gates.view(shape), c_seq, out, self.w_hh, h, c),
            *(dout, self.dh, self.dc, None, self.vectors),
            result=Gradients(dgates.view(shape), self.dh, self.dc, *restarts, dvectors),
            partials=self.partials,
        )
        self.launched.tensors["counters"] = counters
        self.kernel = launch(self.launched)

    def before(self, piece: Piece) -> tuple[Tensor, Tensor | None]:
        """The states [1, B, .] that a piece began with: those after the step before it."""
        if piece.number == 0:
            return self.first
        _, _, layout = self.pieces[piece.number - 1]
        first = piece.row - (layout.batch_sizes or (layout.B,))[-1]
        rows = slice(first, first + piece.layout.B)
        out, c_seq = self.out.whole, None if self.c_seq is None else self.c_seq.whole
        assert out is not None
        return out[None, rows], None if c_seq is None else c_seq[None, rows]

    def pass_down(self, piece: Piece, to: Tensor, mask: Tensor | None) -> None:
        """The gradient of a piece of the input; mask is of the dropout of the layer below."""
        torch.mm(self.dgates[piece], self.w_ih, out=to)
        if mask is not None:
            to.mul_(mask).mul_(self.wave.scale)

    def weigh(self, piece: Piece) -> None:
        """What a piece adds to the gradients of the parameters."""
        dgates = self.dgates[piece]
        if self.dw_ih is not None:
            accumulate(self.dw_ih, dgates, self.x[piece])
        if self.db is not None:
            torch.sum(dgates, 0, dtype=torch.float32, out=self.db[piece.number])
        if self.dw_hh is not None:
            for rows, h in self._operands(piece):
                accumulate(self.dw_hh, dgates[rows], h)

    def _operands(self, piece: Piece) -> list[tuple[slice, Tensor]]:
        """What the recurrent products of a piece took, by rows."""
        layout, out = piece.layout, self.out.whole
        assert out is not None
        if self.operand is not None:
            return [(slice(None), self.operand[piece])]
        (h0, _), B, stop = self.before(piece), layout.B, piece.row + layout.N
        if layout.batch_sizes is not None:
            return [(slice(None), layout.previous(self.out[piece], h0[0], False))]
        if piece.number > 0:
            return [(slice(None), out[piece.row - B : stop - B])]
        first = [] if self.spec.from_zero else [(slice(0, B), h0[0])]
        return [*first, (slice(B, None), out[: stop - B])]

    def gradients(self, dx: Tensor | None) -> InputGrads:
        """Those that are needed, in the type of the input."""
        need, dtype = self.needs.weights[0], self.out[self.pieces[0]].dtype

        def settled(total: Tensor | None) -> Tensor | None:
            return None if total is None else total.to(dtype)

        db = None if self.db is None else self.db.sum(0)
        sums = settled(self.dw_ih), settled(self.dw_hh), settled(db)
        grads = parameter_gradients(self.spec, *sums, need)
        if self.dvectors is not None and need.vectors:
            grads = grads._replace(vectors=self.dvectors.sum((0, 1)).to(dtype))
        dh0 = self.dh.to(dtype) if self.needs.h0 else None
        dc0 = self.dc.to(dtype) if self.needs.c0 and self.dc is not None else None
        restarts = [
            None if parts[0] is None else torch.cat(parts, 1).sum(1).to(dtype)
            for parts in (self.drestart_h, self.drestart_c)
        ]
        return InputGrads(dx, dh0, dc0, (grads,), *restarts)
