"""What is checked: one row for a cell, a type, and a regime of the kernels or an engine of the CPU.

The sizes are such that the planner itself takes the regime, so what is checked is what users run.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import fused_rnn
from fused_rnn.cells import builtin as cells
from fused_rnn.engines import native_rules
from fused_rnn.engines.dispatch import Backend
from fused_rnn.engines.triton import devices
from fused_rnn.engines.triton.devices import UnknownDevice, device_limits
from fused_rnn.engines.triton.plans import choose_plan
from fused_rnn.engines.triton.support import refusal_of_triton
from fused_rnn.kernels.plan import PlanRequest, Precision
from fused_rnn.spec.cells import Cell

# name: (torch.nn's layer, ours, keyword arguments of both)
CELLS: dict[str, tuple[type[Any], type[Any], dict[str, str]]] = {
    "rnn_tanh": (nn.RNN, fused_rnn.FusedRNN, {}),
    "rnn_relu": (nn.RNN, fused_rnn.FusedRNN, {"nonlinearity": "relu"}),
    "gru": (nn.GRU, fused_rnn.FusedGRU, {}),
    "lstm": (nn.LSTM, fused_rnn.FusedLSTM, {}),
}
DTYPES = {
    "fp32": torch.float32,  # in full precision
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp64": torch.float64,
}
# Hidden sizes to try for each regime, the most telling first.
SIZES = {
    "persistent": (128, 64, 32),
    "cooperative": (512, 256, 1024),
    "streamed": (512, 1024, 1536, 2048, 2560, 3072, 4096),
}
QUICK_SIZES = {"persistent": (64, 32), "cooperative": (256, 512)}
QUICK = (
    ("gru", "bf16", "persistent"),
    ("lstm", "fp16", "cooperative"),
    ("rnn_relu", "fp32", "cooperative"),
)
# A cell that torch.nn lacks, whose sweeps are derived: it is compared with the loop of its step.
OWN = "slstm"
OWN_SIZES = {"persistent": (64, 32), "cooperative": (512, 256)}
NO_KERNELS = "none on this device"

PlanOf = Callable[[PlanRequest], Any]


@dataclass(frozen=True)
class Row:
    """One layer to check.

    Attributes:
        cell: a key of CELLS, or OWN.
        dtype: a key of DTYPES.
        wanted: a regime of the kernels, "sweeps" of the CPU, "native" or "eager".
        T: time steps; also B sequences, I inputs, H hidden units.
        timed_steps: time steps where time is taken; 0 if none is.
        backend: the layer's argument.
        repeats: runs that have to give the same bits.
    """

    cell: str
    dtype: str
    wanted: str
    T: int
    B: int
    I: int
    H: int
    timed_steps: int
    backend: Backend = "auto"
    repeats: int = 20

    @property
    def name(self) -> str:
        """What tells it from the other rows."""
        return f"{self.cell} {self.dtype} {self.wanted} H={self.H}"

    @property
    def precision(self) -> Precision:
        """Of fp32 products on a GPU."""
        return "tf32" if self.dtype == "tf32" else "ieee"

    @property
    def known(self) -> Cell:
        """The cell."""
        return cells.CELLS[self.cell] if self.cell in CELLS else slstm()

    def request(self) -> PlanRequest:
        """What the planner is asked."""
        cell = self.known.kernels
        assert cell is not None
        return PlanRequest(cell, self.H, DTYPES[self.dtype], self.B, 1, self.precision)


def slstm() -> Cell:
    """OWN; to derive it takes most of a second, so it is imported when it is wanted."""
    from fused_rnn.cells import slstm as cell

    return cell


def where() -> tuple[torch.device, torch.device | None, str]:
    """Where the rows' tensors lie, what runs their kernels or None, and that in words."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chip = devices.kernel_device(device)
    if reason := refusal_of_triton():
        return device, None, f"none: {reason}"
    if chip is None:
        return device, None, NO_KERNELS
    try:
        device_limits(chip)
    except UnknownDevice as unknown:
        return device, None, f"none: no plan for {unknown}"
    return device, chip, "interpreter" if devices.interpreted() else "compiled"


def rows(*, quick: bool = False, every: bool = False) -> list[Row]:
    """The rows for this machine, as ``TRITON_INTERPRET`` has it."""
    device, chip, _ = where()
    if chip is not None and devices.interpreted():
        return list(_interpreter_rows(quick))
    if chip is not None:
        limits = device_limits(chip)
        plan_of: PlanOf = lambda request: choose_plan(request, limits, chip)  # noqa: E731
        wanted = list(gpu_rows(plan_of, emulated=device != chip, quick=quick, every=every))
        wanted += _own_rows(plan_of, quick)
        return wanted if quick or device != chip else wanted + list(_native_rows())
    if device.type == "cuda":
        return list(_native_rows())
    return list(_cpu_rows(quick))


def gpu_rows(
    plan_of: PlanOf, *, emulated: bool = False, quick: bool = False, every: bool = False
) -> Iterator[Row]:
    """Rows of compiled kernels.

    Every cell meets every type, every cell every regime, and every type every regime; with
    ``every`` also all three together. The kernels of a row take some seconds to compile.

    Args:
        plan_of: the planner: a request to a plan; it may raise DoesNotFit.
        emulated: the tensors lie on the CPU, where torch.nn has no TF32 and times mean nothing.
        quick: three small rows; what streams its weights is not small.
        every: all combinations.
    """
    types = ("fp32", "fp16", "bf16") if emulated else ("fp32", "tf32", "fp16", "bf16")
    regimes = list(SIZES)

    def find(cell: str, dtype: str, regime: str) -> Row | None:
        for H in (QUICK_SIZES if quick else SIZES)[regime]:
            row = Row(
                cell,
                dtype,
                regime,
                T=4 if quick else 32,
                B=8 if quick else 16,
                I=16 if quick else 64,
                H=H,
                timed_steps=0 if emulated else 512,
                backend="triton",  # auto may find torch.nn's own faster
            )
            if _regime(plan_of, row) == regime:
                return row
        return None

    if every:
        candidates = (find(c, d, r) for c in CELLS for d in types for r in regimes)
        yield from (row for row in candidates if row is not None)
        return
    turns = [
        (cell, dtype, regimes[(c + d) % 3])
        for c, cell in enumerate(CELLS)
        for d, dtype in enumerate(types)
    ]
    for cell, dtype, first in QUICK if quick else turns:
        at = regimes.index(first)  # the chip may lack a regime: then the next one
        others = regimes[at:] + regimes[:at]
        options = (find(cell, dtype, r) for r in others if not quick or r in QUICK_SIZES)
        yield from [row for row in options if row is not None][:1]


def _own_rows(plan_of: PlanOf, quick: bool) -> Iterator[Row]:
    """Those of a cell that torch.nn lacks, in bf16; a loop is nothing to be timed beside."""
    for regime, sizes in OWN_SIZES.items():
        for H in sizes:
            T, B, I = (4, 8, 16) if quick else (32, 16, 64)
            row = Row(OWN, "bf16", regime, T, B, I, H, timed_steps=0, backend="triton")
            if _regime(plan_of, row) == regime:
                yield row
                break
        if quick:
            return


def _regime(plan_of: PlanOf, row: Row) -> str | None:
    from fused_rnn.kernels.plan import DoesNotFit

    try:
        return str(plan_of(row.request()).regime)
    except DoesNotFit:
        return None


def _native_rows() -> Iterator[Row]:
    """torch.nn's own kernels on a GPU, as :mod:`fused_rnn.engines.native` calls them."""
    for cell in CELLS:
        for dtype in DTYPES:
            size: dict[str, Any] = {"T": 32, "B": 16, "I": 64, "H": 128, "timed_steps": 256}
            yield Row(cell, dtype, "native", backend="native", **size)


def _cpu_rows(quick: bool) -> Iterator[Row]:
    """What ``auto`` chooses to train, with its times, and what it does not."""
    size: dict[str, Any] = {"T": max(native_rules.SHORT.values()), "B": 8, "I": 32, "H": 64}
    for cell in CELLS:
        for dtype in ("fp32",) if quick else ("fp64", "fp32", "fp16", "bf16"):
            sizes = DTYPES[dtype], size["T"], size["B"], size["H"]
            known = cells.CELLS[cell]
            suits = native_rules.suits(known, *sizes, ragged=False, projected=False, train=True)
            taken, other = ("native", "sweeps") if suits else ("sweeps", "native")
            yield Row(cell, dtype, taken, timed_steps=64, **size)
            backend: Backend = "native" if other == "native" else "cpu"
            yield Row(cell, dtype, other, timed_steps=0, backend=backend, **size)
        if not quick:
            yield Row(cell, "fp32", "eager", timed_steps=0, backend="eager", **size)
    yield Row(OWN, "fp32", "sweeps", timed_steps=0, **size)


def _interpreter_rows(quick: bool) -> Iterator[Row]:
    """Tiny ones: a step takes milliseconds, and numpy gives the same bits at any time.

    The interpreter cuts bf16 off where a GPU rounds, so its errors there say nothing.
    """
    size: dict[str, Any] = {"T": 3, "B": 3, "I": 4, "H": 10, "timed_steps": 0, "repeats": 3}
    for cell in ("gru", "lstm") if quick else CELLS:
        for dtype in ("fp32",) if quick else ("fp32", "fp16"):
            yield Row(cell, dtype, "persistent", backend="triton", **size)
    if not quick:
        yield Row(OWN, "fp32", "persistent", backend="triton", **size)
