"""The autograd functions of a layer and of a stack: they save, restore, and call an engine."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fused_rnn.engines import reference
from fused_rnn.engines.flops import counted
from fused_rnn.engines.wavefront.backward import backward, first_needed, one_by_one
from fused_rnn.engines.wavefront.forward import forward
from fused_rnn.engines.wavefront.stack import SavedLayer, StackLayer, Wavefront
from fused_rnn.spec.context import forward_mode, vectorised
from fused_rnn.spec.layer import (
    Engine,
    InputGrads,
    LayerInputs,
    LayerSpec,
    Needs,
    OutputGrads,
    Outputs,
)
from fused_rnn.spec.precision import without_autocast


class LayerFunction(torch.autograd.Function):
    """One recurrent layer: ``apply(engine, spec, *inputs.flatten())`` returns the outputs."""

    @staticmethod
    def forward(ctx: Any, engine: Engine, spec: LayerSpec, *flat: Tensor | None) -> Outputs:
        """Run the engine's forward and keep what its backward asks for."""
        outputs, saved = counted(engine).forward(spec, LayerInputs.restore(flat), save=True)
        ctx.engine, ctx.spec, ctx.count = engine, spec, len(flat)
        ctx.set_materialize_grads(False)
        # Of the outputs only the first: the caller may overwrite the others.
        ctx.save_for_backward(*flat, outputs.out, *saved)
        return outputs

    @staticmethod
    def backward(ctx: Any, *output_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of all inputs; differentiable themselves under ``create_graph=True``."""
        if all(g is None for g in output_grads):
            return (None,) * len(ctx.needs_input_grad)
        kept = ctx.saved_tensors  # read once: activation checkpointing takes no second time
        inputs = LayerInputs.restore(kept[: ctx.count])
        out, *saved = kept[ctx.count :]
        grads, needs = OutputGrads(*output_grads), Needs.restore(ctx.needs_input_grad[2:])
        with without_autocast(inputs.x.device):  # in which backward may have been called
            if torch.is_grad_enabled() or forward_mode() or vectorised():
                computed = _differentiable(ctx.spec, inputs, grads, needs)
            else:
                engine = counted(ctx.engine)
                computed = engine.backward(ctx.spec, inputs, out, tuple(saved), grads, needs)
        return None, None, *computed.flatten()


def _differentiable(
    spec: LayerSpec, inputs: LayerInputs, grads: OutputGrads, needs: Needs
) -> InputGrads:
    """The gradients by autograd of the eager loop.

    So they can be differentiated again, and ``grads`` may be what no engine can look into.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # An own node for each input: one tensor may stand in two places (tied weights), and the
        # gradient of the one must not hold the other's, too.
        inputs = inputs.map(lambda t: t.view_as(t))
        outputs = reference.run(spec, inputs)
    computed = reference.gradients(
        outputs, grads, inputs.flatten(), needs.flatten(), create_graph=create_graph
    )
    return InputGrads.restore(computed)


class StackFunction(torch.autograd.Function):
    """A stack: ``apply(wave, specs, *flat)`` returns out, h_n and c_n of all layers.

    ``flat`` has the inputs of one layer after the other; x of all but the first stands for nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, wave: Wavefront, specs: Sequence[LayerSpec], *flat: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Run the stack and keep what backward asks for."""
        needs = [Needs.restore(part) for part in _parts(specs, ctx.needs_input_grad[2:])]
        outputs = forward(wave, _layers(specs, flat), first_needed(needs))
        ctx.wave, ctx.specs, ctx.count = wave, specs, len(flat)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*flat, *chain.from_iterable(outputs.saved))
        return outputs.out, outputs.h_n, outputs.c_n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of all inputs; differentiable themselves under ``create_graph=True``."""
        if all(g is None for g in grads):
            return (None,) * len(ctx.needs_input_grad)
        kept = ctx.saved_tensors
        layers = _layers(ctx.specs, kept[: ctx.count])
        width = len(SavedLayer._fields)
        rest = [kept[i : i + width] for i in range(ctx.count, len(kept), width)]
        saved = [SavedLayer(*fields) for fields in rest]
        needs = [Needs.restore(part) for part in _parts(ctx.specs, ctx.needs_input_grad[2:])]
        with without_autocast(layers[0].inputs.x.device):
            if torch.is_grad_enabled() or forward_mode() or vectorised():
                flat = _differentiable_stack(ctx.wave, layers, saved, grads, needs)
            else:
                how = layers, saved, OutputGrads(*grads), needs
                engine = counted(ctx.wave.engine)
                if engine is ctx.wave.engine:
                    computed = backward(ctx.wave, *how)
                else:  # a counter of FLOPs sees layers
                    computed = one_by_one(ctx.wave, engine, *how)
                flat = tuple(chain.from_iterable(g.flatten() for g in computed))
        return None, None, *flat


def _parts(specs: Sequence[LayerSpec], flat: Sequence[Any]) -> list[Sequence[Any]]:
    """``flat`` by layers."""
    width = len(flat) // len(specs)
    return [flat[i : i + width] for i in range(0, len(flat), width)]


def _layers(specs: Sequence[LayerSpec], flat: Sequence[Any]) -> list[StackLayer]:
    parts = zip(specs, _parts(specs, flat), strict=True)
    return [StackLayer(spec, LayerInputs.restore(part)) for spec, part in parts]


def _differentiable_stack(
    wave: Wavefront,
    layers: Sequence[StackLayer],
    saved: Sequence[SavedLayer],
    grads: Sequence[Tensor | None],
    needs: Sequence[Needs],
) -> tuple[Tensor | None, ...]:
    """As :func:`_differentiable`, of a stack."""
    create_graph = torch.is_grad_enabled()
    lowest = first_needed(needs)
    below = [None] * sum(len(inputs.flatten()) for _, inputs in layers[:lowest])
    layers, saved, needs = layers[lowest:], saved[lowest:], needs[lowest:]
    grads = [grads[0], *[None if g is None else g[lowest:] for g in grads[1:]]]
    with torch.enable_grad():
        copies = [inputs.map(lambda t: t.view_as(t)) for _, inputs in layers]
        x, finals = saved[0].x if lowest else copies[0].x, []
        for (spec, _), inputs, kept in zip(layers, copies, saved, strict=True):
            assert x is not None
            outputs = reference.run(spec, inputs._replace(x=x))
            finals.append(outputs)
            x = outputs.out
            if kept.mask is not None:
                x = x * kept.mask * wave.scale
        h_n = torch.cat([outputs.h_n for outputs in finals])
        c_n = [outputs.c_n for outputs in finals if outputs.c_n is not None]
    assert x is not None
    stack = Outputs(x, h_n, torch.cat(c_n) if c_n else None)
    flat = tuple(chain.from_iterable(inputs.flatten() for inputs in copies))
    wanted = tuple(chain.from_iterable(need.flatten() for need in needs))
    found = reference.gradients(stack, OutputGrads(*grads), flat, wanted, create_graph=create_graph)
    return (*below, *found)
