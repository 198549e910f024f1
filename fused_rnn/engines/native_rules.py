"""Where torch.nn's own functions are faster than our sweeps and kernels."""

import platform
from functools import lru_cache
from typing import Any

import torch

from fused_rnn.kernels.plan import Plan, PlanRequest
from fused_rnn.spec.batch import BatchLayout
from fused_rnn.spec.cells import Cell

# ---- on a CPU -----------------------------------------------------------------------------------

# Steps below which setting up our sweeps costs more than they save: of an RNN, of a gated cell.
SHORT = {1: 20, 3: 12, 4: 12}
WIDE = 4096  # hidden units of all sequences, from which products in 16 bits pay
TINY = 4096  # hidden units of all steps and sequences, below which even emulated products do


def suits(
    cell: Cell,
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
        cell: the cell.
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
    short = SHORT[cell.blocks]
    if T is not None and short > T:
        return f"faster below {short} steps"
    if ragged:
        return None
    if cell.has_c and not projected and dtype != torch.float64 and onednn():
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


# ---- on a GPU -----------------------------------------------------------------------------------

# us of both sweeps, as guessed, from which cuDNN's launches of every step take less: these took 38
# to 44, ours with weights in shared memory 1.1 to 1.2 times their guess (LSTM and GRU, H = 2048).
SLOW_STEP = 34.0
FUSED = 128  # hidden units up to which cuDNN runs a layer without launches in every step
# Steps of such an LSTM below which the host is what counts. Measured were 32, 256 and 1024.
HOST_TRAIN, HOST_FORWARD = 640, 320


def may_suit_gpu(dtype: torch.dtype, H: int) -> bool:
    """Whether cuDNN may take less time than the host spends on a call of ours.

    It may where it has no launches in every step; and where we have no kernels, it runs anyway.
    """
    return dtype == torch.float64 or (dtype != torch.bfloat16 and H <= FUSED)


def suits_gpu(request: PlanRequest, plan: Plan, layout: BatchLayout, train: bool) -> str | None:
    """Why cuDNN is the faster one; None where our kernels are.

    Measured on three H200 with PyTorch 2.11 and cuDNN 9.19, see docs/speed.md. Where it was not
    found to be faster (packed batches, two directions), or nothing was measured (GRU in fp16), our
    kernels run; but in full fp32 with few units only once they are timed.

    Args:
        request: the layer.
        plan: by which our kernels would run.
        layout: of the batch.
        train: whether a gradient may be asked for.
    """
    cell, H, dtype, B, D, precision, *_ = request
    T, ragged = layout.T, layout.batch_sizes is not None
    # The guess is too low where weights are streamed: 22 us were measured for 7.8.
    step = plan.step_us * (3 if plan.regime == "streamed" else 1)
    if step > SLOW_STEP:
        return f"our kernels would take about {step:.0f} us for a step, forward and back"
    if H > FUSED or D == 2 or ragged or dtype == torch.bfloat16:
        return None
    how = f"cuDNN has no launches in every step with H up to {FUSED}"
    if dtype == torch.float32 and precision == "ieee":
        return f"{how}; ours are not timed yet in full fp32"
    if cell.states == 1:
        if cell.gates == 1:
            if train and dtype == torch.float16:
                return f"{how}; faster in training of an RNN in fp16"
            return None
        small = dtype == torch.float32 and H <= 64
        return f"{how}; faster for a GRU in fp32 with H up to 64" if small else None
    if train and T * max(B, 128) < HOST_TRAIN * 128:
        return f"{how}: faster in training with few steps"
    if not train and T < HOST_FORWARD:
        return f"{how}: faster in inference below {HOST_FORWARD} steps"
    if not train and dtype == torch.float32 and H <= 64:
        return f"{how}: faster in fp32 with H up to 64"
    return None
