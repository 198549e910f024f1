"""All that this kit knows of names inside the package. Adapt this file when they change.

hook                      used by            what it touches
kernels_for_cpu_tensors   install            engines.triton.devices.kernel_device(device)
precision                 layers, recompile  nothing private: PyTorch's own switches
forced_plan               layers             triton.plans.forced(chooser), kernels.planner.plans
device_contexts           host               engines.triton.engine.device_and_precision
no_launches               waits              engines.triton.engine.launch, kernels.pack.launch_once
recorded_layers           waits              ops.functional.run and route_of, Engine
no_value_checks           waits              layers.call.packed_reset

The device's limits need no hook: the package reads torch.cuda.get_device_properties, which the
emulator replaces. Nor do the kernels: they are launched by Triton, whose driver it replaces.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch

import fused_rnn

# What layers are compared with; public names.
CELLS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "tanh": (torch.nn.RNN, fused_rnn.FusedRNN, {}),
    "relu": (torch.nn.RNN, fused_rnn.FusedRNN, {"nonlinearity": "relu"}),
    "gru": (torch.nn.GRU, fused_rnn.FusedGRU, {}),
    "lstm": (torch.nn.LSTM, fused_rnn.FusedLSTM, {}),
}


class Gone(AttributeError):
    """A name of the package that this file relies on."""


def _module(name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(f"fused_rnn.{name}")
    except ModuleNotFoundError as error:
        raise Gone(f"fused_rnn.{name} is gone: adapt fakegpu/hooks.py") from error


def _replace(owner: Any, name: str, make: Callable[[Any], Any]) -> Any:
    """Put make(old) in the place of an attribute; returns the old one."""
    if not hasattr(owner, name):
        raise Gone(f"{owner.__name__}.{name} is gone: adapt fakegpu/hooks.py")
    old = getattr(owner, name)
    setattr(owner, name, make(old))
    return old


def kernels_for_cpu_tensors() -> None:
    """Let backend="triton" plan a layer of CPU tensors as if they lay on GPU 0."""
    _replace(
        _module("engines.triton.devices"),
        "kernel_device",
        lambda _: lambda device: torch.device("cuda", 0),
    )


def precision(value: str) -> None:
    """Products of fp32: "ieee" or "tf32"."""
    torch.backends.cudnn.rnn.fp32_precision = value


@contextmanager
def forced_plan(**fields: Any) -> Iterator[None]:
    """A group of programs for a layer that is too small to be planned as one, or a plan's variant.

    Args:
        fields: what the plan is to have, or nothing; "regime" is "cooperative" unless given.
    """
    if not fields:
        yield
        return
    wanted = {
        "regime": "cooperative",
        "block_h": 16,
        "block_k": 32,
        "block_b": 8,
        "warps": 4,
    } | fields
    plans = _module("kernels.planner").plans
    tuning = _module("engines.triton.plans")

    def choose(request: Any, limits: Any) -> Any:
        ours = plans(request._replace(B=1, precision="tf32"), limits)[0]
        chunks = 0 if wanted["regime"] == "streamed" else -(-request.H // wanted["block_k"])
        programs = -(-request.H // wanted["block_h"])
        base = {"programs": programs, "chunks": chunks, "k_split": 1, "m_split": 1, "tiles": 0}
        return replace(ours, **(base | {"directions": request.D} | wanted))

    with tuning.forced(choose):
        yield


class _Device:
    """In the place of torch.cuda.device, for tensors without memory."""

    def __init__(self, device: torch.device) -> None:
        self.idx = 0 if device.index is None else device.index

    def __enter__(self) -> None:
        self.before = 0

    def __exit__(self, *error: Any) -> None:
        pass


def device_contexts() -> None:
    """Enter for CPU tensors what a call enters for CUDA tensors, so that its time counts."""
    engine, context = _module("engines.triton.engine"), _module("spec.precision").matmul_precision

    def make(_: Any) -> Any:
        def contexts(x: torch.Tensor, precision: str) -> Any:
            # torch.cuda.current_device costs two calls of this kind where there is a device.
            _ = torch._C._get_tracing_state(), torch._C._get_tracing_state(), x.device.index
            return context(precision) if x.dtype == torch.float32 else nullcontext()

        return contexts

    _replace(engine, "device_and_precision", make)


def no_launches() -> None:
    """For tensors without memory: launches do nothing, not even Triton's own part."""
    _replace(_module("engines.triton.engine"), "launch", lambda _: lambda what: None)
    _replace(_module("kernels.sweeps"), "compile_target", lambda _: lambda device: None)
    _replace(_module("kernels.pack"), "launch_once", lambda _: lambda *args, **arguments: None)


def recorded_layers() -> list[Callable[[], None]]:
    """Let layers run without autograd, which would ask for a real device.

    Returns:
        a list that grows by one call of backward for each layer that runs with gradients enabled
    """
    found: list[Callable[[], None]] = []
    functional, layer = _module("ops.functional"), _module("spec.layer")

    def run(spec: Any, inputs: Any, backend: Any, route: Any = None) -> Any:
        save = torch.is_grad_enabled()
        with torch.enable_grad():  # the choice is that of training
            engine = functional.route_of(spec, inputs, backend).choice.engine
        with torch.set_grad_enabled(save):
            outputs, saved = engine.forward(spec, inputs, save=save)
        marks = [t is not None and t.is_floating_point() for t in inputs.flatten()]
        needs = layer.Needs.restore(marks)

        def backward() -> None:
            grads = [None if t is None else torch.empty_like(t) for t in outputs[:3]]
            engine.backward(spec, inputs, outputs.out, saved, layer.OutputGrads(*grads), needs)

        if save:
            found.append(backward)
        return outputs

    _replace(functional, "run", lambda _: run)
    return found


def no_value_checks() -> None:
    """Skip checks that read values, which tensors without memory do not have (on the CPU)."""
    make = lambda _: lambda input, reset: None if reset is None else reset.data  # noqa: E731
    _replace(_module("layers.call"), "packed_reset", make)
