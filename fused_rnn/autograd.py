"""The autograd function of one layer: it saves, restores, and hands over to an engine."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from fused_rnn import dispatch, reference
from fused_rnn.dispatch import Backend
from fused_rnn.flops import counted
from fused_rnn.precision import without_autocast
from fused_rnn.problem import Engine, Grads, Layer, Outputs, Saved


class LayerFunction(torch.autograd.Function):
    """One recurrent layer, all directions: ``apply(engine, layer, x, h0, c0, *weights)``."""

    @staticmethod
    def forward(ctx: Any, engine: Engine, layer: Layer, *inputs: Tensor | None) -> Outputs:
        """Run the engine's forward and keep what its backward asks for."""
        outputs, saved = counted(engine).forward(layer, inputs, save=True)
        ctx.engine, ctx.layer, ctx.count = engine, layer, len(inputs)
        ctx.set_materialize_grads(False)
        # Of the outputs only the first: the caller may overwrite the others.
        ctx.save_for_backward(*inputs, outputs.out, *saved)
        return outputs

    @staticmethod
    def backward(
        ctx: Any,
        dout: Tensor | None,
        dh_n: Tensor | None,
        dc_n: Tensor | None,
        dc_seq: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of all inputs; differentiable themselves under ``create_graph=True``."""
        engine: Engine = ctx.engine
        layer: Layer = ctx.layer
        kept = ctx.saved_tensors  # read once: activation checkpointing takes no second time
        inputs, rest = kept[: ctx.count], kept[ctx.count :]
        grads, needs = (dout, dh_n, dc_n, dc_seq), ctx.needs_input_grad[2:]
        if all(g is None for g in grads):
            return (None,) * len(ctx.needs_input_grad)
        with without_autocast(inputs[0].device):  # in which backward may have been called
            if torch.is_grad_enabled() or forward_mode() or vectorised():
                found = differentiable(layer, inputs, grads, needs)
            else:
                out, saved = rest[0], rest[1:]
                found = counted(engine).backward(layer, inputs, out, saved, grads, needs)
        return None, None, *found


def differentiable(
    layer: Layer, inputs: Saved, grads: Sequence[Tensor | None], needs: Sequence[bool]
) -> Grads:
    """The gradients of :meth:`fused_rnn.problem.Engine.backward`, by autograd of the eager loop.

    So they can be differentiated again, and ``grads`` may be what no engine can look into.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # An own node for each input: one tensor may stand in two places (tied weights), and the
        # gradient of the one must not hold the other's, too.
        inputs = tuple(t if t is None else t.view_as(t) for t in inputs)
        outputs = reference.run(layer, inputs)
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o is not None and g is not None]
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need and t is not None]
    found = iter(
        torch.autograd.grad(
            [o for o, _ in pairs],
            wanted,
            [g for _, g in pairs],
            create_graph=create_graph,
            allow_unused=True,
        )
    )
    return tuple(next(found) if need else None for need in needs)


_MANY: Any = torch._C._parse_dispatch_key("VmapMode")  # by name it takes longer


def vectorised() -> bool:
    """Whether many gradients are asked for at once, by ``is_grads_batched=True`` and its users.

    What stands for them has no memory to look at. (vmap of torch.func is another one.)
    """
    return torch._C._dispatch_tls_is_dispatch_key_included(_MANY)


def forward_mode() -> bool:
    """Whether a forward-mode derivative may be asked for: none has an engine for it."""
    return forward_ad._current_level >= 0


def run(layer: Layer, inputs: Saved, backend: Backend, transformed: bool = False) -> Outputs:
    """Run one layer, through autograd if a gradient may be asked for.

    ``transformed``: for a transform of torch.func, which may ask for one later.
    """
    record = torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in inputs])
    choice = dispatch.choose_for(
        layer, inputs, backend, record or transformed, recorder=not transformed
    )
    engine = choice.engine
    if engine is None:
        loop = choice.run or reference.run
        if layer.recompute and record:
            found: Any = checkpoint(loop, layer, inputs, use_reentrant=False)
            return Outputs(*found)
        return loop(layer, inputs)
    if record:
        return Outputs(*LayerFunction.apply(engine, layer, *inputs))
    outputs, _ = counted(engine).forward(layer, inputs, save=False)
    return outputs
