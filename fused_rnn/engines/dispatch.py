"""Which engine runs a layer, and why.

Nothing falls back silently: a forced backend that cannot run raises, and ``auto`` gives its reason.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch

from fused_rnn.engines import contest, native, native_rules, reference
from fused_rnn.engines.cpu import engine as cpu
from fused_rnn.engines.flops import counted
from fused_rnn.engines.triton import support
from fused_rnn.engines.triton.products import plan_request
from fused_rnn.spec.layer import Engine, LayerInputs, LayerSpec, Outputs

Backend = Literal["auto", "triton", "cpu", "native", "eager"]
BACKENDS = get_args(Backend)
Run = Callable[[LayerSpec, LayerInputs], Outputs]


class Choice(NamedTuple):
    """What runs a layer.

    Attributes:
        backend: "triton", "cpu", "native" or "eager".
        reason: why this one.
        engine: what implements it, with a backward of its own; None for ``run``.
        run: a function that autograd differentiates itself; None for ``engine``.
    """

    backend: Backend
    reason: str
    engine: Engine | None = None
    run: Run | None = None


def check_backend(backend: str) -> None:
    """Raise ValueError unless ``backend`` names one."""
    if backend not in BACKENDS:
        raise ValueError(f"Unknown backend '{backend}'. Select from {BACKENDS}.")


def choose(
    spec: LayerSpec,
    device: torch.device,
    dtype: torch.dtype,
    backend: Backend,
    record: bool = True,
    autograd_records: bool = False,
) -> Choice:
    """Choose for one layer.

    Args:
        spec: the layer.
        device: where it runs.
        dtype: in what.
        backend: what the user asks for.
        record: whether a gradient may be asked for.
        autograd_records: whether the caller leaves it to autograd to record what has no engine.
            Tracers and transforms do not; if they ``record``, the choice is the same for all T
            and B.

    Raises:
        ValueError: ``backend`` is not a backend's name.
        RuntimeError: the backend that ``backend`` insists on cannot run this.
    """
    if backend not in BACKENDS:
        check_backend(backend)
    if backend == "eager":
        return _eager("backend='eager' asks for it")
    # Whether the engine may depend on T and B: nobody asks it for a backward without those.
    free = not record or (autograd_records and not spec.recompute)
    if backend == "native":
        if refusal := native.why_not(spec, device):
            raise RuntimeError(f"backend='native' cannot run this layer: {refusal}")
        return _native(device, free, "backend='native' asks for it")
    if backend == "cpu" and device.type != "cpu":
        raise RuntimeError(f"backend='cpu' needs tensors on the CPU, but the input is on {device}")
    if device.type == "cpu" and backend != "triton":
        return _on_cpu(spec, dtype, backend, record, free)
    return _on_gpu(spec, device, dtype, backend, record, free)


def _eager(reason: str) -> Choice:
    return Choice("eager", reason, run=reference.run)


def _native(device: torch.device, free: bool, reason: str) -> Choice:
    """torch.nn's functions; on a CPU autograd records them itself if it may.

    Not where FLOPs are counted: the counter knows nothing of oneDNN.
    """
    reason = native.because(reason)
    if free and device.type == "cpu" and counted(native) is native:
        return Choice("native", reason, run=native.run)
    return Choice("native", reason, native)


def _on_cpu(
    spec: LayerSpec, dtype: torch.dtype, backend: Backend, record: bool, free: bool
) -> Choice:
    device = torch.device("cpu")
    if spec.options is not None:
        reason = "the loop of PyTorch calls, which alone knows the options here"
        if backend == "cpu":
            raise RuntimeError(
                f"backend='cpu' cannot run this layer: it takes {reason}; "
                "select backend='auto' or 'eager'"
            )
        return _eager(reason)
    saving = record and spec.recompute  # memory is what counts
    if backend == "auto" and not saving and not native.why_not(spec, device):
        faster = native_rules.suits(
            spec.cell,
            dtype,
            spec.layout.T if free else None,
            spec.layout.B,
            spec.hidden_size,
            ragged=spec.layout.batch_sizes is not None,
            projected=spec.projected,
            train=record,
        )
        if faster is not None:
            return _native(device, free, faster)
    if spec.cell.pointwise:
        reason = "backend='cpu' asks for them"
        if backend == "auto":
            faster = "faster here than torch.nn's own"
            if spec.cell.torch is None or spec.heads > 1:
                faster = f"torch.nn has no {'such cell' if spec.cell.torch is None else 'heads'}"
            reason = faster
            reason = "recompute=True" if saving else reason
        return Choice("cpu", f"sweeps of PyTorch calls: {reason}", cpu)
    reason = f"no sweeps can be derived of {spec.cell.name}, whose step is not pointwise"
    if backend == "cpu":
        raise RuntimeError(f"backend='cpu' cannot run this layer: {reason}")
    return _eager(reason)


def _on_gpu(
    spec: LayerSpec,
    device: torch.device,
    dtype: torch.dtype,
    backend: Backend,
    record: bool,
    free: bool,
) -> Choice:
    if backend == "auto" and free and native.steps_at_once(spec, device, dtype):
        return Choice("eager", f"torch.{spec.cell.name}_cell, for a single step", run=native.step)
    engine = support.make_engine(spec, device, dtype)
    refusal = native.why_not(spec, device)
    if isinstance(engine, str):
        if backend == "triton":
            raise RuntimeError(
                f"backend='triton' cannot run {spec.cell.name} with "
                f"hidden_size={spec.hidden_size} in {dtype} on {device}: {engine}"
            )
        reason = f"no fused kernel: {engine}"
        if refusal is None:
            return _native(device, free, reason)
        return _eager(f"{reason}; not torch.nn's own: {refusal}")
    saving = record and spec.recompute  # memory is what counts
    if backend == "auto" and free and not saving and refusal is None and device.type == "cuda":
        request, layout = plan_request(spec, dtype, engine.precision), spec.layout
        winner, faster = contest.winner(request, layout, record, device), None
        if winner == "native":
            faster = "they were timed faster on this GPU"
        elif winner is None and native.cudnn():
            faster = native_rules.suits_gpu(request, engine.plan, layout, record)
        if faster is not None:
            return _native(device, free, faster)
    return Choice("triton", engine.plan.reason, engine)
