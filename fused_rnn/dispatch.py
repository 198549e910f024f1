"""Which backend runs a layer, and why.

Nothing falls back silently: a forced backend that cannot run raises, and ``auto`` gives its reason.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch

from fused_rnn import contest, cpu, native, step, triton_backend
from fused_rnn.flops import counted
from fused_rnn.problem import Engine, Layer, Outputs, Saved
from fused_rnn.tuning import Request

Backend = Literal["auto", "triton", "cpu", "native", "eager"]
BACKENDS = get_args(Backend)


class Choice(NamedTuple):
    """The backend that runs a layer.

    Attributes:
        backend: "triton", "cpu", "native" or "eager".
        engine: what implements it; None for what autograd differentiates itself.
        reason: why this one.
        run: what runs in place of an engine; None for the eager loop.
    """

    backend: Backend
    engine: Engine | None
    reason: str
    run: Callable[[Layer, Saved], Outputs] | None = None


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
        recorder: whether the caller leaves it to autograd to record what has no engine. Tracers
            and transforms do not; if they ``record``, the choice is the same for all T and B.

    Raises:
        ValueError: ``backend`` is not a backend's name.
        RuntimeError: the backend that ``backend`` insists on cannot run this.
    """
    if backend not in BACKENDS:
        check_backend(backend)
    if backend == "eager":
        return Choice("eager", None, "backend='eager' asks for it")
    # Whether the engine may depend on T and B: nobody asks it for a backward without those.
    free = not record or (recorder and not layer.recompute)
    if backend == "native":
        if refusal := native.why_not(layer, device):
            raise RuntimeError(f"backend='native' cannot run this layer: {refusal}")
        return _native(device, free, "backend='native' asks for it")
    if backend == "cpu" and device.type != "cpu":
        raise RuntimeError(f"backend='cpu' needs tensors on the CPU, but the input is on {device}")
    choose = _on_cpu if device.type == "cpu" and backend != "triton" else _on_gpu
    return choose(layer, device, dtype, H, projected, backend, record, free)


def _native(device: torch.device, free: bool, reason: str) -> Choice:
    """torch.nn's functions; on a CPU autograd records them itself if it may.

    Not where FLOPs are counted: the counter knows nothing of oneDNN.
    """
    itself = free and device.type == "cpu" and counted(native) is native
    return Choice("native", None if itself else native, native.because(reason), native.run)


def _on_cpu(
    layer: Layer,
    device: torch.device,
    dtype: torch.dtype,
    H: int,
    projected: bool,
    backend: Backend,
    record: bool,
    free: bool,
) -> Choice:
    if layer.extras is not None:
        reason = "the loop of PyTorch calls, which alone knows the extras here"
        if backend == "cpu":
            raise RuntimeError(
                f"backend='cpu' cannot run this layer: it takes {reason}; "
                "select backend='auto' or 'eager'"
            )
        return Choice("eager", None, reason)
    saving = record and layer.recompute  # memory is what counts
    if backend == "auto" and not saving and not native.why_not(layer, device):
        faster = native.suits(
            layer.cell.name,
            dtype,
            layer.rows.T if free else None,
            layer.rows.B,
            H,
            ragged=layer.rows.batch_sizes is not None,
            projected=projected,
            train=record,
        )
        if faster is not None:
            return _native(device, free, faster)
    if layer.cell.name in cpu.CELLS:
        reason = "backend='cpu' asks for them"
        if backend == "auto":
            reason = "recompute=True" if saving else "faster here than torch.nn's own"
        return Choice("cpu", cpu, f"sweeps of PyTorch calls: {reason}")
    reason = f"the CPU engine has no sweeps for {layer.cell.name}"
    if backend == "cpu":
        raise RuntimeError(f"backend='cpu' cannot run this layer: {reason}")
    return Choice("eager", None, reason)


def _on_gpu(
    layer: Layer,
    device: torch.device,
    dtype: torch.dtype,
    H: int,
    projected: bool,
    backend: Backend,
    record: bool,
    free: bool,
) -> Choice:
    if backend == "auto" and free and step.suits(layer, device, dtype, projected):
        reason = f"torch.{layer.cell.name}_cell, for a single step"
        return Choice("eager", None, reason, step.forward)
    engine = triton_backend.make_engine(layer, device, dtype, H, projected)
    refusal = native.why_not(layer, device)
    if isinstance(engine, str):
        if backend == "triton":
            raise RuntimeError(
                f"backend='triton' cannot run {layer.cell.name} with hidden_size={H} in {dtype} on "
                f"{device}: {engine}"
            )
        reason = f"no fused kernel: {engine}"
        if refusal is None:
            return _native(device, free, reason)
        return Choice("eager", None, f"{reason}; not torch.nn's own: {refusal}")
    saving = record and layer.recompute  # memory is what counts
    if backend == "auto" and free and not saving and refusal is None and device.type == "cuda":
        request = Request.of(layer, H, dtype, engine.precision)
        winner, faster = contest.winner(request, layer.rows, record, device), None
        if winner == "native":
            faster = "they were timed faster on this GPU"
        elif winner is None and native.cudnn():
            faster = native.suits_gpu(request, engine.plan, layer.rows, record)
        if faster is not None:
            return _native(device, free, faster)
    return Choice("triton", engine, engine.plan.reason)
