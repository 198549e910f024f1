"""Microseconds of the host per call of a layer, beside torch.nn's: what a short sequence waits for.

    python -m bench.host

Tiny layers, so that computing hardly counts. With a GPU, the time until a call returns. Without
one, the Triton engine runs on CPU tensors with kernels that do nothing: all of our Python counts,
and the products around the sweeps at their tiny sizes, but neither Triton's launcher (the GPU's
driver) nor, of torch.nn, what it would cost on a GPU. One thread; medians of calls that take turns.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fused_rnn
from bench import timing
from fused_rnn.engines.triton import devices, plans
from fused_rnn.kernels import pack, variants
from fused_rnn.kernels.chips import LIMITS

T, B, I, H = 3, 2, 8, 32
CALLS = 20  # of one turn


@dataclass(frozen=True)
class Case:
    """A layer of each side, and whether its input is packed."""

    theirs: type[nn.Module]
    ours: type[nn.Module]
    options: dict[str, Any]
    packed: bool = False


CASES = {
    "RNN": Case(nn.RNN, fused_rnn.FusedRNN, {}),
    "GRU": Case(nn.GRU, fused_rnn.FusedGRU, {}),
    "LSTM": Case(nn.LSTM, fused_rnn.FusedLSTM, {}),
    "LSTM, packed": Case(nn.LSTM, fused_rnn.FusedLSTM, {}, packed=True),
    "LSTM, 2 layers, bidirectional": Case(
        nn.LSTM, fused_rnn.FusedLSTM, {"num_layers": 2, "bidirectional": True}
    ),
}


class IdleKernel:
    """Stands in for a Triton function: compiled and launched, it does nothing.

    Attributes:
        arg_names: of the function.
        found: keywords of the launches that asked the JIT, as a first launch of a kind does.
        direct: arguments of those that did not.
    """

    def __init__(self, kernel: Any) -> None:
        self.arg_names: list[str] = list(kernel.arg_names)
        self.found: list[dict[str, Any]] = []
        self.direct: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., "_Compiled"]:
        def launch(**arguments: Any) -> _Compiled:
            self.found.append(arguments)
            return _Compiled(self)

        return launch


@dataclass
class _Compiled:
    kernel: IdleKernel

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return self._launch

    def _launch(self, *arguments: Any) -> None:
        self.kernel.direct.append(arguments)


@contextmanager
def idle_gpu(arch: int = 90) -> Iterator[dict[str, IdleKernel]]:
    """Let ``backend="triton"`` take CPU tensors, as on a GPU whose kernels do nothing.

    Yields:
        the kernels by name
    """
    gpu, limits = torch.device("cuda", 0), LIMITS[arch]
    kernels: dict[str, IdleKernel] = {}
    with ExitStack() as stack:
        stack.enter_context(patch.object(devices, "kernel_device", lambda _: gpu))
        stack.enter_context(patch.object(devices, "device_limits", lambda _: limits))
        stack.enter_context(plans.forced(lambda request, limits: plans.planned(request, limits)[0]))
        for module, names in (
            (variants, ["forward_kernel", "backward_kernel"]),
            (pack, ["pack_kernel", "unpack_kernel"]),
        ):
            for name in names:
                kernels[name] = IdleKernel(getattr(module, name))
                stack.enter_context(patch.object(module, name, kernels[name]))
        yield kernels


def calls_of(layer: nn.Module, x: Any) -> dict[str, Callable[[], None]]:
    """The two calls that are timed."""
    parameters = list(layer.parameters())

    def output() -> Tensor:
        out = layer(x)[0]
        return out.data if isinstance(out, PackedSequence) else out

    def inference() -> None:
        with torch.no_grad():
            layer(x)

    grad = torch.ones_like(output().detach())

    def training() -> None:
        torch.autograd.backward(output(), grad)
        for p in parameters:
            p.grad = None

    return {"forward": inference, "training": training}


def measure(case: Case, device: torch.device, seconds: float) -> dict[str, dict[str, timing.Times]]:
    """By call and side, ``CALLS`` calls at a time."""
    x: Any = torch.randn(T, B, I, device=device)
    if case.packed:
        x = pack_padded_sequence(x, torch.tensor([T, T - 1]))
    sides = {
        "torch.nn": calls_of(case.theirs(I, H, **case.options).to(device), x),
        "fused_rnn": calls_of(case.ours(I, H, backend="triton", **case.options).to(device), x),
    }

    def many(call: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(CALLS):
                call()

        return run

    def once(run: timing.Run) -> list[float]:
        times = timing.clock(run)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return times

    return {
        what: timing.interleaved({s: many(c[what]) for s, c in sides.items()}, seconds, once, 40)
        for what in ("forward", "training")
    }


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each comparison")
    args = parser.parse_args(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    what = torch.cuda.get_device_name(device) if gpu else "no GPU: launches do nothing"
    print(f"torch {torch.__version__}, {what}; us per call, and the ratio fused_rnn / torch.nn\n")
    print("| layer | forward: torch.nn | ours | ratio | training: torch.nn | ours | ratio |")
    print("|---|---|---|---|---|---|---|")
    with ExitStack() as stack:
        if not gpu:
            stack.enter_context(idle_gpu())
        for name, case in CASES.items():
            cells = [name]
            for times in measure(case, device, args.seconds).values():
                theirs, ours = times["torch.nn"], times["fused_rnn"]
                us = [1e3 * t.median / CALLS for t in (theirs, ours)]
                cells += [f"{us[0]:.0f}", f"{us[1]:.0f}", f"{1 / ours.ratio:.2f}"]
            print("| " + " | ".join(cells) + " |", flush=True)
    torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
