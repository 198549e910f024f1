"""One row: errors beside torch.nn's, the same bits at every run, and, if all is right, the time."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fused_rnn.base import FusedRNNBase
from fused_rnn.check.rows import CELLS, DTYPES, Row
from fused_rnn.check.speed import times
from fused_rnn.explain import explain

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


def worst(found: Results, theirs: Results, exact: Results) -> Error:
    """The error that is closest to its bound, or furthest beyond."""

    def error(name: str) -> Error:
        expected = exact[name]
        if found[name].shape != expected.shape:
            raise ValueError(f"{name} is {found[name].shape}, not {expected.shape}")
        ours, other = (
            (t[name].double() - expected).abs().max().item() if expected.numel() else 0.0
            for t in (found, theirs)
        )
        bound = allowed(other, expected.abs().max().item(), found[name].dtype)
        return Error(name, ours, other, bound)

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
    error = worst(mine, results(plain), results(exact))
    numbers = {"error": error.ours, "torch_error": error.theirs, "allowed": error.allowed}
    found: dict[str, Any] = {"where": error.where}
    found |= {k: v if math.isfinite(v) else None for k, v in numbers.items()}  # JSON has no NaN
    differ = ""
    for _ in range(row.repeats):
        again = results(fused)
        differ = differ or next((n for n in mine if not torch.equal(mine[n], again[n])), "")
    found["identical"] = not differ
    if not error.right:
        found["why"] = (
            f"WRONG: {error.where} has an error of {error.ours:.1e}, {error.allowed:.1e} is allowed"
        )
    elif differ:
        found["why"] = f"NOT REPEATABLE: {differ} differs between two runs"
    else:
        found["state"] = "green"
        if row.timed_steps:
            found |= times(row, plain, fused, device)
    return found


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
    """The same layer three times, on the CPU: torch.nn's in fp64, torch.nn's, ours."""
    theirs, ours, options = CELLS[row.cell]
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

    states = [random(1, row.B, row.H) for _ in range(2 if row.cell == "lstm" else 1)]
    dout = [random(row.T, row.B, row.H), *(random(1, row.B, row.H) for _ in states)]
    return random(row.T, row.B, row.I), states, dout


def run(
    layer: nn.Module, x: Tensor, states: list[Tensor], dout: list[Tensor], device: torch.device
) -> Results:
    """Outputs without and with gradients, and the gradients of everything."""
    dtype = next(layer.parameters()).dtype
    x, *hx = (t.detach().to(device, dtype).requires_grad_() for t in (x, *states))
    state = tuple(hx) if len(hx) == 2 else hx[0]

    def outputs() -> list[Tensor]:
        out, final = layer(x, state)
        return [out, *(final if isinstance(final, tuple) else (final,))]

    with torch.no_grad():
        names = "inference", "its h_n", "its c_n"  # the kernels are others than in training
        found = dict(zip(names, outputs(), strict=False))
    outs = outputs()
    found |= dict(zip(("output", "h_n", "c_n"), outs, strict=False))
    wanted = {"dx": x, **dict(zip(("dh_0", "dc_0"), hx, strict=False))}
    for name, parameter in layer.named_parameters():
        short = name.replace("weight", "w").replace("bias", "b").removesuffix("_l0")
        wanted[f"d{short}"] = parameter
    grads = torch.autograd.grad(outs, list(wanted.values()), [g.to(device, dtype) for g in dout])
    found |= dict(zip(wanted, grads, strict=True))
    return {name: t.detach() for name, t in found.items()}
