"""torch.nn's own recurrent functions as an engine: cuDNN, MIOpen, oneDNN, or PyTorch's loop in C++.

It runs where they are faster than our sweeps or kernels, and where there are none of ours; the
rules stand at the end. On a CPU autograd records the call itself: it can differentiate it to any
order. Elsewhere it cannot (cuDNN's backward has none of its own), so there the call is an engine
like any other, see :class:`fused_rnn.problem.Engine`.
"""

import platform
import warnings
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fused_rnn.cells import BY_NAME
from fused_rnn.problem import Grads, Layer, OutputGrads, Outputs, Saved
from fused_rnn.rows import Rows

if TYPE_CHECKING:
    from fused_rnn.kernels.plan import Plan
    from fused_rnn.tuning import Request

# By the name of the cell.
FUNCTIONS: dict[str, Any] = {
    "rnn_tanh": torch._VF.rnn_tanh,
    "rnn_relu": torch._VF.rnn_relu,
    "gru": torch._VF.gru,
    "lstm": torch._VF.lstm,
}
MODES = {"rnn_relu": 0, "rnn_tanh": 1, "lstm": 2, "gru": 3}  # cuDNN's numbers for them
DEVICES = frozenset({"cpu", "cuda", "mps", "xpu"})  # the types for which PyTorch has kernels
MOST_STEPS = 65_535  # of one call of cuDNN (https://github.com/pytorch/pytorch/issues/133751)


def why_not(layer: Layer, device: torch.device) -> str | None:
    """Why torch.nn's functions cannot run this layer, or None."""
    if layer.extras is not None:
        return "it has no extras"
    if layer.cell.name not in FUNCTIONS:
        return f"it has no {layer.cell.name}"
    if device.type not in DEVICES:
        return f"it is not used on {device.type}"
    if layer.directions == 2 and _most_steps(layer, device) < layer.rows.T:
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


def _most_steps(layer: Layer, device: torch.device) -> int:
    return MOST_STEPS if device.type == "cuda" else layer.rows.T


# ---- one layer ----------------------------------------------------------------------------------


def run(layer: Layer, inputs: Saved, train: bool = False) -> Outputs:
    """One layer, recorded by autograd where gradients are.

    Args:
        layer: the layer; :func:`why_not` has nothing against it.
        inputs: as in :class:`fused_rnn.problem.Engine`.
        train: keep what a backward needs on a GPU, where nobody else says that there will be one.
    """
    x, h0, c0, *flat = inputs
    assert x is not None
    assert h0 is not None
    weights = [t for t in flat if t is not None]
    rows = layer.rows
    sizes = rows.batch_sizes or (rows.B,) * rows.T
    states: tuple[Tensor, ...] = (h0,) if c0 is None else (h0, c0)
    most = _most_steps(layer, x.device)
    outs, first = [], 0
    for t in range(0, rows.T, most):  # a single turn, but for a GPU's longest sequences
        piece = sizes[t : t + most]
        n, running = sum(piece), piece[0]
        mine = x if n == rows.N else x[first : first + n]
        ragged = None if rows.batch_sizes is None else piece
        entering = tuple([s[:, :running] for s in states]) if running < rows.B else states
        out, *new = _call(layer, mine, ragged, len(piece), entering, weights, train)
        if running < rows.B:  # the others have ended
            new = [torch.cat([s, old[:, running:]], 1) for s, old in zip(new, states, strict=True)]
        outs.append(out)
        states, first = tuple(new), first + n
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    return Outputs(out, states[0], states[1] if len(states) == 2 else None)


def _call(
    layer: Layer,
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
    each, two = len(weights) // layer.directions, layer.directions == 2
    bias, projected = each >= 4, each % 2 == 1
    if sizes is None:
        x = x.reshape(T, -1, x.shape[-1])
    if x.is_cuda and torch.cudnn_is_acceptable(x):
        return _cudnn(layer, x, sizes, states, weights, projected, train)
    if x.is_cpu and projected:
        expect_no_projection()
    hx = states if len(states) == 2 else states[0]
    call, how = FUNCTIONS[layer.cell.name], (bias, 1, 0.0, train, two)
    if sizes is None:
        out, *final = call(x, hx, weights, *how, False)
        return out.flatten(0, 1), *final
    found: tuple[Tensor, ...] = call(x, torch.tensor(sizes), hx, weights, *how)
    return found


def _cudnn(
    layer: Layer,
    x: Tensor,
    sizes: tuple[int, ...] | None,
    states: tuple[Tensor, ...],
    weights: list[Tensor],
    projected: bool,
    train: bool,
) -> tuple[Tensor, ...]:
    """The same by cuDNN, which copies the weights into a piece of memory of its own.

    ``torch._VF.lstm`` would call it, too, and warn at each call that they are not in one piece.
    """
    out, h_n, c_n, *_ = torch._cudnn_rnn(
        x,
        [w.contiguous() for w in weights],
        len(weights) // layer.directions,
        None,
        states[0].contiguous(),
        states[1].contiguous() if len(states) == 2 else None,
        MODES[layer.cell.name],
        weights[0].shape[0] // layer.cell.gates,
        states[0].shape[-1] if projected else 0,
        1,
        False,
        0.0,
        train,
        layer.directions == 2,
        list(sizes or ()),
        None,
    )
    out = out.flatten(0, 1) if sizes is None else out
    return (out, h_n, c_n) if len(states) == 2 else (out, h_n)


# ---- the engine ---------------------------------------------------------------------------------


def forward(layer: Layer, inputs: Saved, save: bool) -> tuple[Outputs, Saved]:
    """See :class:`fused_rnn.problem.Engine`."""
    if save and not layer.recompute:
        return _recorded(layer, inputs)
    with torch.no_grad():
        return run(layer, inputs), ()


def saved_specs(layer: Layer, inputs: Saved) -> None:
    """See :class:`fused_rnn.problem.Engine`: what is saved are tensors with a graph."""
    return


def backward(
    layer: Layer,
    inputs: Saved,
    out: Tensor,
    saved: Saved,
    grads: OutputGrads,
    needs: tuple[bool, ...],
) -> Grads:
    """See :class:`fused_rnn.problem.Engine`."""
    if not saved:  # recompute, or an operator of ours
        _, saved = _recorded(layer, inputs)
    results, leaves = saved[:3], saved[3:]
    pairs = [
        (o, g) for o, g in zip(results, grads, strict=False) if o is not None and g is not None
    ]
    wanted = [t for t, need in zip(leaves, needs, strict=True) if need and t is not None]
    found = iter(
        torch.autograd.grad(
            [o for o, _ in pairs],
            wanted,
            [g for _, g in pairs],
            retain_graph=True,  # it goes with what is saved
            allow_unused=True,
        )
    )
    return tuple([next(found) if need else None for need in needs])


def _recorded(layer: Layer, inputs: Saved) -> tuple[Outputs, Saved]:
    """Forward with a graph of its own, which the tensors to be saved hold.

    They are the three outputs, and the variables that stand for the inputs.
    """
    # Each input is a variable of its own: one tensor may stand in two places (tied weights).
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    # Autograd has no say within an operator of ours, unless it is let in.
    with torch._C._SetExcludeDispatchKeyGuard(_AUTOGRAD, False), torch.enable_grad():
        found = run(layer, tuple(leaves), train=True)
    # The states are the caller's, who may overwrite them.
    h_n, c_n = (None if s is None else s.detach().clone() for s in (found.h_n, found.c_n))
    assert h_n is not None
    return Outputs(found.out.detach(), h_n, c_n), (found.out, found.h_n, found.c_n, *leaves)


_AUTOGRAD: Any = torch._C.DispatchKey.AutogradFunctionality


# ---- where it is the faster one: on a CPU -------------------------------------------------------

# Steps below which setting up our sweeps costs more than they save: of an RNN, of a gated cell.
SHORT = {1: 20, 3: 12, 4: 12}
WIDE = 4096  # hidden units of all sequences, from which products in 16 bits pay
TINY = 4096  # hidden units of all steps and sequences, below which even emulated products do


def suits(
    cell: str,
    dtype: torch.dtype,
    T: int | None,
    B: int,
    H: int,
    *,
    ragged: bool,
    projected: bool,
    train: bool,
) -> str | None:
    """Why torch.nn's function is the faster one on a CPU; None where our sweeps are.

    Measured on two cores of Zen 3 (AVX2); that for 16 bits with instructions for them on Zen 4 with
    an earlier state of this code. `python -m bench.sweep_cpu` shows what comes of it.

    Args:
        cell: the cell's name.
        dtype: in which the layer runs.
        T: time steps; None where T and B are symbols.
        B: sequences.
        H: hidden units.
        ragged: whether the sequences differ in length.
        projected: whether h is projected.
        train: whether a gradient may be asked for.
    """
    if not multiplies(dtype):  # our sweeps multiply in fp32, and round less
        tiny = T is not None and T * B * H < TINY
        return "faster where the call is so small" if tiny else None
    if not train:
        return "faster in inference"
    short = SHORT[BY_NAME[cell].gates]
    if T is not None and short > T:
        return f"faster below {short} steps"
    if ragged:
        return None
    if cell == "lstm" and not projected and dtype != torch.float64 and onednn():
        return "oneDNN's fused LSTM"
    if dtype.itemsize == 2 and T is not None and B * H >= WIDE:
        return f"this CPU multiplies {dtype}"
    return None


def onednn() -> bool:
    """Whether oneDNN is there and not switched off."""
    return torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()


def multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products of a type; else PyTorch emulates them."""
    return dtype.itemsize != 2 or (_multiplies(dtype) and onednn())


@lru_cache
def _multiplies(dtype: torch.dtype) -> bool:
    if platform.machine() not in ("x86_64", "AMD64"):
        return True  # not measured: torch.nn's own kernels are never slower than themselves
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    cpu: Any = torch.cpu
    there = cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported()
    return there and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


# ---- and on a GPU -------------------------------------------------------------------------------

SLOW_STEP = 40.0  # us of both sweeps, from which cuDNN's launches of every step take less
FUSED = 128  # hidden units up to which cuDNN runs an LSTM without launches in every step
HOST_TRAIN, HOST_FORWARD = 512, 128  # steps of such an LSTM, below which the host is what counts


def suits_gpu(request: "Request", plan: "Plan", rows: Rows, train: bool) -> str | None:
    """Why cuDNN is the faster one; None where our kernels are.

    Measured on an H200 with PyTorch 2.11 and cuDNN 9.19, see docs/speed.md. Where nothing was
    measured (packed batches, two directions, GRU and RNN in fp16), our kernels run.

    Args:
        request: the layer.
        plan: by which our kernels would run.
        rows: the batch.
        train: whether a gradient may be asked for.
    """
    cell, H, dtype, B, D, precision = request
    T, ragged = rows.T, rows.batch_sizes is not None
    # The guess is too low where weights are streamed: 22 us were measured for 7.8.
    step = plan.step_us * (3 if plan.regime == "streamed" else 1)
    if step > SLOW_STEP:
        return f"our kernels would take about {step:.0f} us for a step, forward and back"
    if cell != "lstm" or H > FUSED or D == 2 or ragged or dtype == torch.bfloat16:
        return None
    how = f"cuDNN has no launches in every step for an LSTM with H up to {FUSED}"
    if dtype == torch.float32 and precision == "ieee":
        return f"{how}; ours are slow in full fp32"
    if train and T * max(B, 128) < HOST_TRAIN * 128:
        return f"{how}: faster in training with few steps"
    if not train and T < HOST_FORWARD:
        return f"{how}: faster in inference below {HOST_FORWARD} steps"
    if not train and dtype == torch.float32 and H <= 64:
        return f"{how}: faster in fp32 with H up to 64"
    return None
