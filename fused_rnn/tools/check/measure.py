"""One row: errors beside torch.nn's, the same bits at every run, and, if all is right, the time."""

import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fused_rnn.layers.base import FusedRecurrent, FusedRNNBase
from fused_rnn.spec.precision import matmul_precision
from fused_rnn.tools.check.rows import CELLS, DTYPES, Row
from fused_rnn.tools.explain import explain

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Error:
    """The largest error of one tensor, torch.nn's own, and how large ours may be."""

    where: str
    ours: float
    theirs: float
    allowed: float

    @property
    def right(self) -> bool:
        """Whether it is within the bound; NaN is not."""
        return self.ours <= self.allowed

    @property
    def share(self) -> float:
        """Of the bound that is used up."""
        share = self.ours / self.allowed
        return math.inf if math.isnan(share) else share


def allowed(theirs: float, size: float, dtype: torch.dtype) -> float:
    """The bound of an error: twice torch.nn's, and 1e-5 (fp64: 1e-11).

    One more rounding of the result's size is granted: of a few products torch.nn may be exact by
    luck.
    """
    floor = 1e-11 if dtype == torch.float64 else 1e-5
    return 2 * theirs + torch.finfo(dtype).eps * size + floor


def worst(ours: Results, theirs: list[Results], exact: Results) -> Error:
    """The error closest to its bound, or furthest beyond it; of ``theirs`` the largest counts."""

    def error(name: str) -> Error:
        expected = exact[name]
        if ours[name].shape != expected.shape:
            raise ValueError(f"{name} is {ours[name].shape}, not {expected.shape}")
        mine, *others = (
            (t[name].double() - expected).abs().max().item() if expected.numel() else 0.0
            for t in (ours, *theirs)
        )
        other = max(others)
        bound = allowed(other, expected.abs().max().item(), ours[name].dtype)
        return Error(name, mine, other, bound)

    return max(map(error, exact), key=lambda e: e.share)


def measure(row: Row, device: torch.device, note: Callable[..., None]) -> dict[str, Any]:
    """Check a row, and if it is right, take its time.

    ``note`` is told what will run, before it does: a report needs it most if nothing else comes.
    """
    set_precision(row.precision)
    exact, plain, fused = layers(row)
    for layer in (exact, plain, fused):
        layer.to(device)
    x, states, dout = inputs(row)
    reason = explain(fused, x.to(device))[0]
    note(ran=ran(reason.backend, reason.reason), reason=str(reason))

    def results(layer: nn.Module) -> Results:
        return run(layer, x, states, dout, device)

    mine = results(fused)
    theirs = [results(plain)]
    if row.dtype == "tf32":  # cuDNN may do without TF32; a loop of such products does not
        loop = copy.deepcopy(fused)
        loop.backend = "eager"
        with matmul_precision("tf32"):
            theirs.append(results(loop))
    error = worst(mine, theirs, results(exact))
    numbers = {"error": error.ours, "torch_error": error.theirs, "allowed": error.allowed}
    facts: dict[str, Any] = {"where": error.where}
    facts |= {k: v if math.isfinite(v) else None for k, v in numbers.items()}  # JSON has no NaN
    differ = ""
    for _ in range(row.repeats):
        again = results(fused)
        differ = differ or next((n for n in mine if not torch.equal(mine[n], again[n])), "")
    facts["identical"] = not differ
    if not error.right:
        facts["why"] = (
            f"WRONG: {error.where} has an error of {error.ours:.1e}, {error.allowed:.1e} is allowed"
        )
    elif differ:
        facts["why"] = f"NOT REPEATABLE: {differ} differs between two runs"
    else:
        facts["state"] = "green"
        if row.timed_steps:
            facts |= times(row, plain, fused, device)
    return facts


def set_precision(setting: str) -> None:
    """Of fp32 products of recurrent layers on a GPU, torch.nn's and ours."""
    rnn: Any = torch.backends.cudnn.rnn
    rnn.fp32_precision = setting


def ran(backend: str, reason: str) -> str:
    """The regime or the engine that ``explain`` names."""
    if backend == "triton":
        return reason.partition(":")[0]
    return "sweeps" if backend == "cpu" else backend


def layers(row: Row) -> tuple[nn.Module, nn.Module, FusedRNNBase]:
    """The same layer three times, on the CPU: torch.nn's in fp64, torch.nn's, ours.

    In the place of torch.nn's stands the eager loop of a cell that it lacks.
    """
    theirs: Any
    ours: Any
    theirs, ours, options = CELLS.get(row.cell, (None, None, {}))
    if theirs is None:
        ours = partial(FusedRecurrent, row.known)
        theirs = partial(ours, backend="eager")
    torch.manual_seed(0)
    dtype = DTYPES[row.dtype]
    plain = theirs(row.I, row.H, dtype=dtype, **options)
    if row.cell == "rnn_relu":
        away_from_zero(plain)
    fused: FusedRNNBase = ours(row.I, row.H, dtype=dtype, backend=row.backend, **options)
    fused.load_state_dict(plain.state_dict())
    exact = theirs(row.I, row.H, dtype=torch.float64, **options)
    exact.load_state_dict(plain.state_dict())
    return exact, plain, fused


@torch.no_grad()
def away_from_zero(layer: Any) -> None:
    """Keep each unit of a ReLU on its side of zero.

    Rounding would move one across, and with it whole gradients: that is no error of anybody.
    """
    layer.weight_ih_l0.mul_(0.5)
    layer.weight_hh_l0.mul_(0.25)
    signs = torch.arange(layer.hidden_size) % 2 * 2.0 - 1
    layer.bias_hh_l0.copy_(4 * signs)


def inputs(row: Row) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """x, the states, and what the outputs are multiplied by to be a loss; rounded to the type."""
    generator = torch.Generator().manual_seed(1)

    def random(*size: int) -> Tensor:
        drawn = torch.randn(size, generator=generator, dtype=torch.float64)
        return drawn.to(DTYPES[row.dtype])

    count = len(row.known.states)
    # Not any number is a state of sLSTM, whose n counts: it begins as it does by itself.
    states = [random(1, row.B, row.H) for _ in range(count if row.cell in CELLS else 0)]
    dout = [random(row.T, row.B, row.H), *(random(1, row.B, row.H) for _ in range(count))]
    return random(row.T, row.B, row.I), states, dout


def run(
    layer: nn.Module, x: Tensor, states: list[Tensor], dout: list[Tensor], device: torch.device
) -> Results:
    """Outputs without and with gradients, and the gradients of everything."""
    dtype = next(layer.parameters()).dtype
    x, *hx = (t.detach().to(device, dtype).requires_grad_() for t in (x, *states))
    state = tuple(hx) if len(hx) == 2 else hx[0] if hx else None

    def outputs() -> list[Tensor]:
        out, final = layer(x, state)
        return [out, *(final if isinstance(final, tuple) else (final,))]

    with torch.no_grad():
        names = "inference", "its h_n", "its c_n"  # the kernels are others than in training
        tensors = dict(zip(names, outputs(), strict=False))
    outs = outputs()
    tensors |= dict(zip(("output", "h_n", "c_n"), outs, strict=False))
    wanted = {"dx": x, **dict(zip(("dh_0", "dc_0"), hx, strict=False))}
    for name, parameter in layer.named_parameters():
        short = name.replace("weight", "w").replace("bias", "b").removesuffix("_l0")
        wanted[f"d{short}"] = parameter
    grads = torch.autograd.grad(outs, list(wanted.values()), [g.to(device, dtype) for g in dout])
    tensors |= dict(zip(wanted, grads, strict=True))
    return {name: t.detach() for name, t in tensors.items()}


# ---- the time of a layer beside torch.nn's: both take turns in one process ----------------------

TURNS = 7  # at least
SECONDS = 0.4  # for all times of a row


def times(row: Row, plain: nn.Module, fused: nn.Module, device: torch.device) -> dict[str, float]:
    """Microseconds of a time step, ours and torch.nn's, which take turns."""
    shape, dtype = (row.timed_steps, row.B), DTYPES[row.dtype]
    x = torch.randn(*shape, row.I, device=device).to(dtype)
    dout = torch.randn(*shape, row.H, device=device).to(dtype)
    leaf = x.clone().requires_grad_()

    def forward(layer: nn.Module) -> None:
        with torch.no_grad():
            layer(x)

    def train(layer: nn.Module) -> None:
        torch.autograd.grad(layer(leaf)[0], [leaf, *layer.parameters()], dout)

    figures: dict[str, float] = {}
    for mode, call in (("forward", forward), ("train", train)):
        ours, theirs = in_turns(lambda: call(fused), lambda: call(plain), device)  # noqa: B023
        figures[f"{mode}_us"] = 1e6 * ours / row.timed_steps
        figures[f"torch_{mode}_us"] = 1e6 * theirs / row.timed_steps
        figures[f"{mode}_ratio"] = theirs / ours
    return figures


def in_turns(
    first: Callable[[], None], second: Callable[[], None], device: torch.device
) -> tuple[float, float]:
    """Median seconds of two calls that take turns, so that a slow moment is one of both."""
    clock = cuda_seconds if device.type == "cuda" else seconds
    for _ in range(2):  # to compile, to allocate
        first()
        second()
    samples: list[tuple[float, float]] = []
    end = time.perf_counter() + SECONDS / 2
    while len(samples) < TURNS or time.perf_counter() < end:
        samples.append((clock(first), clock(second)))
    ours, theirs = zip(*samples, strict=True)
    return statistics.median(ours), statistics.median(theirs)


def seconds(call: Callable[[], None]) -> float:
    """Of a call, by the wall clock."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cuda_seconds(call: Callable[[], None]) -> float:
    """Of a call, until the GPU is done."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return 1e-3 * milliseconds
