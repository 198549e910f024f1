"""Which backend runs a layer, and why.

Nothing falls back silently: a forced backend that cannot run raises, and ``auto`` gives its reason.
"""

from typing import Literal, NamedTuple, get_args

import torch

from fused_rnn import cpu, onednn, step, triton_backend
from fused_rnn.problem import Engine, Layer, Saved

Backend = Literal["auto", "triton", "cpu", "eager"]
BACKENDS = get_args(Backend)


class Choice(NamedTuple):
    """The backend that runs a layer.

    Attributes:
        backend: "triton", "cpu" or "eager".
        engine: what implements it; None for the eager loop, which autograd differentiates itself.
        reason: why this one.
        step: whether it is a single step, which :mod:`fused_rnn.step` runs in place of the loop.
    """

    backend: Backend
    engine: Engine | None
    reason: str
    step: bool = False


def check_backend(backend: str) -> None:
    """Raise ValueError unless ``backend`` names one."""
    if backend not in BACKENDS:
        raise ValueError(f"Unknown backend '{backend}'. Select from {BACKENDS}.")


def choose_for(
    layer: Layer, inputs: Saved, backend: Backend, record: bool = True, recorder: bool = False
) -> Choice:
    """Choose for ``inputs`` as in :class:`fused_rnn.problem.Engine`; else as :func:`choose`."""
    x, w_hh, w_hr = inputs[0], inputs[4], inputs[7]
    assert x is not None
    assert w_hh is not None
    H = w_hh.shape[0] // layer.cell.gates
    return choose(layer, x.device, x.dtype, H, w_hr is not None, backend, record, recorder)


def choose(
    layer: Layer,
    device: torch.device,
    dtype: torch.dtype,
    H: int,
    projected: bool,
    backend: Backend,
    record: bool = True,
    recorder: bool = False,
) -> Choice:
    """Choose for one layer; it runs on ``device`` in ``dtype`` with ``H`` hidden units.

    Args:
        layer: what is to be run.
        device: where.
        dtype: in what.
        H: hidden units.
        projected: whether there is a projection.
        backend: what the user asks for.
        record: whether a gradient may be asked for.
        recorder: whether the caller leaves it to autograd to record a single step.

    Raises:
        ValueError: ``backend`` is not a backend's name.
        RuntimeError: the backend that ``backend`` insists on cannot run this.
    """
    if backend not in BACKENDS:
        check_backend(backend)
    if backend == "eager":
        return Choice("eager", None, "backend='eager' asks for it")
    plain = not record or (recorder and not layer.recompute)
    if backend == "auto" and plain and step.suits(layer, device, dtype, projected):
        reason = f"torch.{layer.cell.name}_cell, for a single step"
        return Choice("eager", None, reason, step=True)
    if backend == "cpu" and device.type != "cpu":
        raise RuntimeError(f"backend='cpu' needs tensors on the CPU, but the input is on {device}")
    if device.type == "cpu" and backend != "triton" and layer.extras is not None:
        reason = "the loop of PyTorch calls, which alone knows the extras here"
        if backend == "cpu":
            raise RuntimeError(
                f"backend='cpu' cannot run this layer: it takes {reason}; "
                "select backend='auto' or 'eager'"
            )
        return Choice("eager", None, reason)
    if device.type == "cpu" and backend != "triton":
        refusal = onednn.why_not(layer, dtype, projected)
        if refusal is None:
            return Choice("cpu", onednn, "oneDNN's fused LSTM")
        if layer.cell.name in cpu.CELLS:
            return Choice("cpu", cpu, f"sweeps of PyTorch calls; not oneDNN, since {refusal}")
        reason = f"the CPU engine has no sweeps for {layer.cell.name}"
        if backend == "cpu":
            raise RuntimeError(f"backend='cpu' cannot run this layer: {reason}")
        return Choice("eager", None, reason)
    engine = triton_backend.make_engine(layer, device, dtype, H, projected)
    if not isinstance(engine, str):
        return Choice("triton", engine, engine.plan.reason)
    if backend == "triton":
        raise RuntimeError(
            f"backend='triton' cannot run {layer.cell.name} with hidden_size={H} in {dtype} on "
            f"{device}: {engine}"
        )
    return Choice("eager", None, f"no fused kernel: {engine}")
