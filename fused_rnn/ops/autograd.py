"""The autograd function of one layer: it saves, restores, and hands over to an engine."""

from typing import Any

import torch
from torch import Tensor

from fused_rnn.engines import reference
from fused_rnn.engines.flops import counted
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
