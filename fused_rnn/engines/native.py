"""torch.nn's own recurrent functions as an engine: cuDNN, MIOpen, oneDNN, or PyTorch's loop in C++.

It runs where they are faster than our sweeps or kernels, and where there are none of ours, see
:mod:`fused_rnn.engines.native_rules`. On a CPU autograd records the call itself: it can
differentiate it to any order. Elsewhere it cannot (cuDNN's backward has none of its own), so there
the call is an engine like any other, see :class:`fused_rnn.spec.layer.Engine`.
"""

import warnings
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fused_rnn.engines import reference
from fused_rnn.spec.cells import TorchFunctions
from fused_rnn.spec.layer import (
    InputGrads,
    LayerInputs,
    LayerSpec,
    Needs,
    OutputGrads,
    Outputs,
    Saved,
)
from fused_rnn.spec.precision import matmul_precision, rnn_precision

DEVICES = frozenset({"cpu", "cuda", "mps", "xpu"})  # the types for which PyTorch has kernels
MOST_STEPS = 65_535  # of one call of cuDNN (https://github.com/pytorch/pytorch/issues/133751)


def why_not(spec: LayerSpec, device: torch.device) -> str | None:
    """Why torch.nn's functions cannot run this layer, or None."""
    if spec.options is not None:
        return "it has no options"
    if spec.cell.torch is None:
        return f"it has no {spec.cell.name}"
    if spec.heads > 1:
        return "it has no heads"
    if device.type not in DEVICES:
        return f"it is not used on {device.type}"
    if spec.directions == 2 and _most_steps(spec, device) < spec.layout.T:
        return f"cuDNN takes at most {MOST_STEPS} steps, and two directions cannot be cut"
    return None


def because(reason: str) -> str:
    """``reason`` as :func:`fused_rnn.explain` tells it."""
    return f"torch.nn's own kernels: {reason}"


def cudnn() -> bool:
    """Whether a GPU here has cuDNN, and it is not switched off."""
    cudnn: Any = torch.backends.cudnn
    return torch.version.hip is None and cudnn.is_available() and cudnn.enabled


@lru_cache
def expect_no_projection() -> None:
    """Let PyTorch warn, unheard, that oneDNN has no projections: it does once in a process.

    Nobody asked for oneDNN; what runs is right.
    """
    x, c0, w_ih = torch.zeros(1, 1, 1), torch.zeros(1, 1, 2), torch.zeros(8, 1)
    weights = [w_ih, w_ih, torch.zeros(1, 2)]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch._VF.lstm(x, (x, c0), weights, False, 1, 0.0, False, False, False)


def _most_steps(spec: LayerSpec, device: torch.device) -> int:
    return MOST_STEPS if device.type == "cuda" else spec.layout.T


def _functions(spec: LayerSpec) -> TorchFunctions:
    functions = spec.cell.torch
    assert functions is not None, "why_not has seen to it"
    return functions


# ---- one layer ----------------------------------------------------------------------------------


def run(spec: LayerSpec, inputs: LayerInputs, train: bool = False) -> Outputs:
    """One layer, recorded by autograd where gradients are.

    Args:
        spec: the layer; :func:`why_not` has nothing against it.
        inputs: its tensors.
        train: keep what a backward needs on a GPU, where nobody else says that there will be one.
    """
    x, h0, c0, directions, _ = inputs
    weights = [t for w in directions for t in w if t is not None]
    layout = spec.layout
    sizes = layout.batch_sizes or (layout.B,) * layout.T
    states: tuple[Tensor, ...] = (h0,) if c0 is None else (h0, c0)
    most = _most_steps(spec, x.device)
    outs, first = [], 0
    for t in range(0, layout.T, most):  # a single turn, but for a GPU's longest sequences
        piece = sizes[t : t + most]
        n, running = sum(piece), piece[0]
        mine = x if n == layout.N else x[first : first + n]
        ragged = None if layout.batch_sizes is None else piece
        entering = tuple([s[:, :running] for s in states]) if running < layout.B else states
        out, *new = _call(spec, mine, ragged, len(piece), entering, weights, train)
        if running < layout.B:  # the others have ended
            new = [torch.cat([s, old[:, running:]], 1) for s, old in zip(new, states, strict=True)]
        outs.append(out)
        states, first = tuple(new), first + n
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    return Outputs(out, states[0], states[1] if len(states) == 2 else None)


def _call(
    spec: LayerSpec,
    x: Tensor,
    sizes: tuple[int, ...] | None,
    T: int,
    states: tuple[Tensor, ...],
    weights: list[Tensor],
    train: bool,
) -> tuple[Tensor, ...]:
    """``out`` and the final states of one call, for rows ``x`` of ``T`` steps.

    ``sizes`` are the rows of each, None where all own as many.
    """
    each, two = len(weights) // spec.directions, spec.directions == 2
    bias, projected = each >= 4, each % 2 == 1
    if sizes is None:
        x = x.reshape(T, -1, x.shape[-1])
    if x.is_cuda and torch.cudnn_is_acceptable(x):
        return _cudnn(spec, x, sizes, states, weights, projected, train)
    if x.is_cpu and projected:
        expect_no_projection()
    hx = states if len(states) == 2 else states[0]
    call, how = _functions(spec).layer, (bias, 1, 0.0, train, two)
    if sizes is None:
        out, *final = call(x, hx, weights, *how, False)
        return out.flatten(0, 1), *final
    results: tuple[Tensor, ...] = call(x, torch.tensor(sizes), hx, weights, *how)
    return results


def _cudnn(
    spec: LayerSpec,
    x: Tensor,
    sizes: tuple[int, ...] | None,
    states: tuple[Tensor, ...],
    weights: list[Tensor],
    projected: bool,
    train: bool,
) -> tuple[Tensor, ...]:
    """The same by cuDNN, which wants the weights in one piece of memory: copies of them."""
    mode, H = _functions(spec).cudnn_mode, spec.hidden_size
    each, two = len(weights) // spec.directions, spec.directions == 2
    R = states[0].shape[-1] if projected else 0
    how: tuple[Any, ...] = (mode, H, R, 1, False)
    memory = in_one_piece([w.detach() for w in weights], each, x.shape[-1], *how, two)
    c0 = states[1].contiguous() if len(states) == 2 else None
    rest: Any = (*how, 0.0, train, two, list(sizes or ()), None)
    out, h_n, c_n, *_ = torch._cudnn_rnn(
        x, [w.contiguous() for w in weights], each, memory, states[0].contiguous(), c0, *rest
    )
    out = out.flatten(0, 1) if sizes is None else out
    return (out, h_n, c_n) if len(states) == 2 else (out, h_n)


def in_one_piece(weights: list[Any], each: int, input_size: int, *how: Any) -> Tensor:
    """Let ``weights`` lie in one new piece of memory, in cuDNN's order; returns it.

    Without it cuDNN would copy them, and PyTorch warn at each call. What ``detach`` returns of a
    parameter moves alone.

    Args:
        weights: in torch.nn's order.
        each: of one direction.
        input_size: I.
        *how: cuDNN's number for the cell, H, R, layers, batch_first, two directions.
    """
    with torch.no_grad():
        return torch._cudnn_rnn_flatten_weight(weights, each, input_size, *how)


# ---- a single step on a GPU ---------------------------------------------------------------------


def steps_at_once(spec: LayerSpec, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether :func:`step` runs a layer: a single time step, off the CPU.

    There is no loop to fuse, so what counts is what a sweep spends before and after it. 16-bit
    types run on CUDA alone: elsewhere the cells round every intermediate result. Only "auto" comes
    here: an engine that is asked for by name runs also a single step itself, for the results
    of one long call to the last bit. (On a CPU the functions above run a single step.)
    """
    wide = device.type == "cuda" or dtype in (torch.float32, torch.float64)
    plain = not spec.projected and spec.options is None and spec.cell.torch is not None
    return spec.layout.T == 1 and device.type != "cpu" and wide and plain


def step(spec: LayerSpec, inputs: LayerInputs) -> Outputs:
    """One step by PyTorch's own cell, a call for each direction; autograd records it."""
    x, h0, c0, weights, _ = inputs
    cell = _functions(spec).step
    h: list[Tensor] = []
    c: list[Tensor] = []
    with matmul_precision(rnn_precision()) if x.is_cuda else nullcontext():
        for d, w in enumerate(weights):
            if c0 is None:
                h.append(cell(x, h0[d], *w[:4]))
            else:
                new = cell(x, (h0[d], c0[d]), *w[:4])
                h.append(new[0])
                c.append(new[1])
    out = h[0] if len(h) == 1 else torch.cat(h, dim=1)
    return Outputs(out, torch.stack(h), torch.stack(c) if c else None)


# ---- the engine ---------------------------------------------------------------------------------


def forward(spec: LayerSpec, inputs: LayerInputs, save: bool) -> tuple[Outputs, Saved]:
    """Run the layer; what is saved are tensors with a graph of their own.

    See :class:`fused_rnn.spec.layer.Engine`.
    """
    if save and not spec.recompute:
        return _recorded(spec, inputs)
    with torch.no_grad():
        return run(spec, inputs), ()


def saved_specs(spec: LayerSpec, inputs: LayerInputs) -> None:
    """None: what is saved are no plain tensors, see :class:`fused_rnn.spec.layer.Engine`."""
    return


def backward(
    spec: LayerSpec,
    inputs: LayerInputs,
    out: Tensor,
    saved: Saved,
    grads: OutputGrads,
    needs: Needs,
) -> InputGrads:
    """Differentiate the graph that is saved, or a new one; see the Engine protocol."""
    if not saved:  # recompute, or an operator of ours
        _, saved = _recorded(spec, inputs)
    # The graph goes with what is saved.
    computed = reference.gradients(saved[:3], grads, saved[3:], needs.flatten(), retain_graph=True)
    return InputGrads.restore(computed)


def _recorded(spec: LayerSpec, inputs: LayerInputs) -> tuple[Outputs, Saved]:
    """Forward with a graph of its own, which the tensors to be saved hold.

    They are the three outputs, and the variables that stand for the inputs.
    """
    # Each input is a variable of its own: one tensor may stand in two places (tied weights).
    leaves = inputs.map(lambda t: t.detach().requires_grad_())
    # Autograd has no say within an operator of ours, unless it is let in.
    with torch._C._SetExcludeDispatchKeyGuard(_AUTOGRAD, False), torch.enable_grad():
        out, h_n, c_n, _ = run(spec, leaves, train=True)
    # The states are the caller's, who may overwrite them.
    c_copy = None if c_n is None else c_n.detach().clone()
    outputs = Outputs(out.detach(), h_n.detach().clone(), c_copy)
    return outputs, (out, h_n, c_n, *leaves.flatten())


_AUTOGRAD: Any = torch._C.DispatchKey.AutogradFunctionality
