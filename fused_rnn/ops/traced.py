"""What the operators of a traced call compute: one layer, or a stack whose layers may overlap."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_rnn.engines import reference
from fused_rnn.engines.triton.engine import TritonEngine
from fused_rnn.engines.wavefront.backward import backward, top_down
from fused_rnn.engines.wavefront.forward import forward
from fused_rnn.engines.wavefront.stack import (
    SavedLayer,
    StackLayer,
    Wavefront,
    dropout_scale,
    wavefront,
)
from fused_rnn.kernels.launch import LaunchRefused
from fused_rnn.ops.encoding import Settings, by_layer, rows_of, sorted_out
from fused_rnn.spec.layer import InputGrads, Needs, OutputGrads, Outputs, Saved, Specs

LayerBackward = Callable[[int, OutputGrads, Needs], InputGrads]


class Ran(NamedTuple):
    """What a stack has computed.

    Attributes:
        outs: rows [N, D*R] of each layer; of those of which nothing is saved, what is passed on.
        finals: h_n, c_n and c of all steps, of all layers together.
        saved: what each layer saves for backward.
    """

    outs: Sequence[Tensor]
    finals: tuple[Tensor | None, ...]
    saved: Sequence[Saved]


class Stack:
    """The arguments of either operator, sorted out: see `operators.layers_op`.

    Attributes:
        tensors: as they were given.
        told: the settings of each layer.
        calls: of each layer; inputs of those above the first stand for nothing.
        masks: rows of each, or none.
        dropout: probability that an element is dropped.
        lowest: the first layer for which something is saved.

    ``traced`` sizes are not looked at; ``recorded``: there is a backward, whatever was saved.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        masks: Sequence[Tensor],
        batch_sizes: Tensor | None,
        settings: str,
        numbers: Sequence[float],
        dropout: float,
        lowest: int,
        *,
        traced: bool = False,
        recorded: bool = False,
    ) -> None:
        x, width = tensors[0], tensors[1].shape[-1]
        self.tensors, self.told = tensors, Settings.each(settings)
        self.masks = [mask.reshape(-1, mask.shape[-1]) for mask in masks]
        self.dropout, self.lowest = dropout, lowest
        parts = by_layer(tensors, self.told, x.new_empty(()).expand(*x.shape[:-1], width))
        self.calls = [
            sorted_out(
                part, batch_sizes, told, numbers, traced=traced, record=recorded or number >= lowest
            )
            for number, (part, told) in enumerate(zip(parts, self.told, strict=True))
        ]

    @property
    def kept(self) -> range:
        """The layers whose outputs are saved beside that of the last: inputs of those above."""
        last = len(self.calls) - 1
        return range(max(0, self.lowest - 1), last) if self.lowest <= last else range(0)

    def specs(self, number: int) -> Specs | None:
        """Of what a layer saves; None if its backward can do without."""
        spec, inputs, engine, _ = self.calls[number]
        return engine.saved_specs(spec, inputs)

    def dropped(self, rows: Tensor, number: int) -> Tensor:
        """What dropout behind a layer leaves of its output, or of the gradient."""
        if not self.masks or number == len(self.calls) - 1:
            return rows
        return rows * self.masks[number] * dropout_scale(self.dropout)

    def wave(self, train: bool) -> Wavefront | None:
        """How the layers overlap, or None."""
        spec, inputs, engine, run = self.calls[-1]
        if len(self.calls) == 1 or run is not None or not isinstance(engine, TritonEngine):
            return None
        wave = wavefront(engine, spec, inputs.x, len(self.calls), self.dropout, train)
        return None if isinstance(wave, str) else wave

    def layers(self) -> list[StackLayer]:
        """As the wavefront takes them."""
        return [StackLayer(call.spec, call.inputs) for call in self.calls]

    # ---- forward

    def run(self) -> Ran:
        """Forward through all layers."""
        wave = self.wave(train=self.lowest < len(self.calls))
        if wave is not None:
            try:
                return self._together(wave)
            except LaunchRefused:  # by itself a layer takes a smaller plan
                pass
        return self._one_by_one()

    def _together(self, wave: Wavefront) -> Ran:
        out, h_n, c_n, saved = forward(wave, self.layers(), self.lowest, self.masks)
        outs = [layer.out for layer in saved[:-1]]
        if 0 < self.lowest < len(saved):
            outs[self.lowest - 1] = saved[self.lowest].x
        kept: list[Saved] = [()] * self.lowest
        for (spec, *_), layer in list(zip(self.calls, saved, strict=True))[self.lowest :]:
            gates, N = layer.gates, spec.layout.N
            gates = None if gates is None else gates.view(1, N, spec.hidden_size, -1)
            kept.append((gates, layer.c_seq, layer.operand))
        return Ran([*outs, out], (h_n, c_n, None), kept)  # type: ignore[list-item]

    def _one_by_one(self) -> Ran:
        x = self.calls[0].inputs.x
        ran: list[Outputs] = []
        outs, all_saved = [], list[Saved]()
        saved: Saved
        for number, (spec, inputs, engine, run) in enumerate(self.calls):
            inputs = inputs._replace(x=x)
            if run is not None:
                outputs, saved = run(spec, inputs), ()
            else:
                save = number >= self.lowest and self.specs(number) is not None
                outputs, saved = engine.forward(spec, inputs, save)
            x = self.dropped(outputs.out, number)
            outs.append(x if number < self.lowest else outputs.out)
            ran.append(outputs)
            all_saved.append(saved)
        if len(ran) == 1:
            return Ran(outs, tuple(ran[0][1:]), all_saved)
        h_n = torch.cat([outputs.h_n for outputs in ran])
        c_n = [outputs.c_n for outputs in ran if outputs.c_n is not None]
        return Ran(outs, (h_n, torch.cat(c_n) if c_n else None, None), all_saved)

    # ---- backward

    def restored(self, results: Sequence[Tensor]) -> Ran:
        """What forward saved, of ``results``; where that is nothing, it runs a second time."""
        out, *rest = results
        last = len(self.calls) - 1
        if self.lowest > last and (last > 0 or self.specs(last) is not None):
            self.lowest = 0
            return self.run()
        left = iter(rest)
        outs = {last: rows_of(out)} | {n: rows_of(next(left)) for n in self.kept}
        saved: list[Saved] = [()] * min(self.lowest, last)
        for number in range(min(self.lowest, last), last + 1):
            specs = self.specs(number) or ()
            saved.append(tuple([None if s is None else next(left) for s in specs]))
        all_outs = [outs.get(n) for n in range(last + 1)]
        return Ran(all_outs, (), saved)  # type: ignore[arg-type]

    def backward(self, ran: Ran, grads: OutputGrads, needs: Sequence[Needs]) -> list[InputGrads]:
        """The gradients of each layer's inputs that are wanted; of x, that of the first layer."""
        self._fill_in(ran)
        wave = self.wave(train=True)
        if wave is not None:
            return backward(wave, self.layers(), self._saved_layers(ran), grads, needs)

        def of_engine(number: int, grads: OutputGrads, need: Needs) -> InputGrads:
            spec, inputs, engine, _ = self.calls[number]
            return engine.backward(spec, inputs, ran.outs[number], ran.saved[number], grads, need)

        return self._down(grads, needs, of_engine)

    def pull_back(self, ran: Ran, grads: OutputGrads, needs: Sequence[Needs]) -> list[InputGrads]:
        """The same by the eager loop, also for many gradients at once."""
        self._fill_in(ran)

        def of_loop(number: int, grads: OutputGrads, need: Needs) -> InputGrads:
            return reference.pull_back(*self.calls[number][:2], grads, need)

        return self._down(grads, needs, of_loop)

    def _fill_in(self, ran: Ran) -> None:
        """The inputs of all layers that backward reaches."""
        for number in range(max(1, self.lowest), len(self.calls)):
            x = ran.outs[number - 1]
            if number > self.lowest:
                x = self.dropped(x, number - 1)
            call = self.calls[number]
            self.calls[number] = call._replace(inputs=call.inputs._replace(x=x))

    def _saved_layers(self, ran: Ran) -> list[SavedLayer]:
        layers = []
        for n, (call, out) in enumerate(zip(self.calls, ran.outs, strict=True)):
            gates, c_seq, operand = ran.saved[n] or (None, None, None)
            gates = None if gates is None else gates.view(call.spec.layout.N, -1)
            mask = self.masks[n] if n < len(self.masks) else None
            layers.append(SavedLayer(call.inputs.x, out, gates, c_seq, mask, operand))
        return layers

    def _down(
        self, grads: OutputGrads, needs: Sequence[Needs], layer_backward: LayerBackward
    ) -> list[InputGrads]:
        """Layer by layer; the only one may have two directions, and c of all steps."""
        if len(self.calls) == 1:
            return [layer_backward(0, grads, needs[0])]
        return top_down(layer_backward, self.dropped, grads, needs)

    # ---- by place

    def sorted_grads(
        self, grads: Sequence[Tensor], given: Sequence[bool], needs: Sequence[bool]
    ) -> tuple[OutputGrads, list[Needs]]:
        """The gradients of all outputs, and which of the inputs of each layer want one."""
        left = iter(grads)
        dout, dh_n, dc_n, dc_seq = (*[next(left) if g else None for g in given], None, None)[:4]
        marks = []
        for call, part in zip(self.calls, by_layer(needs, self.told, False), strict=True):
            wanted = iter(part)
            flat = [t is not None and next(wanted) for t in call.inputs.flatten()]
            marks.append(Needs.restore(flat))
        return OutputGrads(rows_of(dout), dh_n, dc_n, rows_of(dc_seq)), marks

    def wanted(self, computed: Sequence[InputGrads], needs: Sequence[bool]) -> list[Tensor]:
        """Those of the gradients of tensors that ``needs`` marks, in their shapes."""
        flat: list[Tensor | None] = []
        for number, (call, grads) in enumerate(zip(self.calls, computed, strict=True)):
            both = list(zip(call.inputs.flatten(), grads.flatten(), strict=True))
            flat += [grad for tensor, grad in both[number > 0 :] if tensor is not None]
        every = zip(self.tensors, flat, needs, strict=True)
        marked = [(tensor, grad) for tensor, grad, need in every if need]
        return [torch.zeros_like(t) if g is None else g.reshape(t.shape) for t, g in marked]
