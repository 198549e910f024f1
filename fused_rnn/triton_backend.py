"""Whether the Triton engine can run a layer, and by which plan. Triton is imported only if so."""

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fused_rnn import devices
from fused_rnn.cells import BY_NAME, Cell
from fused_rnn.kernels.plan import DoesNotFit
from fused_rnn.precision import rnn_precision
from fused_rnn.problem import Layer
from fused_rnn.triton_products import H_SLOTS, PRODUCTS, SAVED, X_SLOTS
from fused_rnn.tuning import Request, choose_plan

if TYPE_CHECKING:
    from fused_rnn.triton_engine import TritonEngine

OLDEST_TRITON = (3, 6)  # the kernels are compiled by 3.6 and 3.9 in tests
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@lru_cache
def _refusal_of_triton() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    import triton

    major, minor, *_ = triton.__version__.split(".")
    if (int(major), int(minor)) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"the kernels need Triton {oldest} or newer, not {triton.__version__}"
    return None


def refusal(dtype: torch.dtype, projected: bool) -> str | None:
    """Why no GPU could run a layer, or None."""
    if reason := _refusal_of_triton():
        return reason
    if dtype not in _DTYPES:
        return f"there are kernels for float32, float16 and bfloat16, not for {dtype}"
    if projected:
        return "there are no kernels for projections (proj_size)"
    return None


def register(
    cell: Cell,
    *,
    step: Any,
    factors: Any,
    adjoint: Any,
    x_slots: tuple[int, ...],
    h_slots: tuple[int, ...],
    saved: Callable[[Tensor], Any],
    cell_state: Any = None,
) -> None:
    """Let the kernels run one more cell; docs/adding_a_cell.md has an example.

    Args:
        cell: the cell, known to :func:`fused_rnn.cells.register`.
        step: Triton functions as in ``fused_rnn/kernels/cells.py``; so the next two.
        factors: see there.
        adjoint: see there.
        x_slots: the slot of each gate's input part.
        h_slots: the slot of each gate's recurrent part. It is the same one, but if the last gate
            has its input part in slot 2, its recurrent part may have slot 3 (the GRU's way).
        saved: the slots [N, H, S] from pre-activations to what ``step`` saves, in place, in
            PyTorch: for ``recompute``.
        cell_state: Triton function ``(saved, c before) -> c after`` the step. Without one, a cell
            with c runs in the eager loop where there is zoneout.

    Raises:
        ValueError: the slots are none that the kernels have, or the cell is not known, or has
            kernels already.
    """
    from fused_rnn.kernels import cells as kernel_cells
    from fused_rnn.kernels.plan import SPECS, Spec

    if BY_NAME.get(cell.name) is not cell or cell.name in SPECS:
        raise ValueError(f"the cell {cell.name!r} is not registered, or has its kernels already")
    split = x_slots[:-1] == h_slots[:-1] and (x_slots[-1:], h_slots[-1:]) == ((2,), (3,))
    gates = 1 if h_slots == (0,) else 3 if split else 4
    fits = (split or x_slots == h_slots) and set(h_slots) <= set(PRODUCTS[gates])
    fits = fits and len(set(h_slots)) == len(h_slots) == cell.gates
    if not fits or (gates == 1) != (cell.gates == 1):
        raise ValueError(
            f"the kernels cannot run {cell.gates} gates with x_slots={x_slots}, h_slots={h_slots}"
        )
    SPECS[cell.name] = Spec(gates, 1 if gates == 1 else 4, 2 if cell.has_c else 1)
    kernel_cells.STEPS[cell.name] = step
    kernel_cells.FACTORS[cell.name] = factors
    kernel_cells.ADJOINTS[cell.name] = adjoint
    X_SLOTS[cell.name], H_SLOTS[cell.name] = x_slots, h_slots
    SAVED[cell.name] = saved
    if cell_state is not None:
        kernel_cells.CELL_STATES[cell.name] = cell_state


def make_engine(
    layer: Layer, device: torch.device, dtype: torch.dtype, H: int, projected: bool
) -> "TritonEngine | str":
    """The engine for a layer, or why there is none."""
    chip = devices.kernel_device(device)
    if chip is None:
        return f"Triton runs on CUDA and ROCm devices, not on {device.type}"
    if reason := refusal(dtype, projected):
        return reason
    if layer.extras is not None and layer.extras.zoned and layer.cell.has_c:
        from fused_rnn.kernels.cells import CELL_STATES

        if layer.cell.name not in CELL_STATES:
            return f"there are no kernels for {layer.cell.name} with zoneout"
    # 16-bit products have no such switch, and the interpreter has no tensor cores.
    switched = chip.type == "cuda" and dtype == torch.float32
    precision: Literal["ieee", "tf32"] = rnn_precision() if switched else "ieee"
    request = Request.of(layer, H, dtype, precision)
    try:
        plan = choose_plan(request, devices.device_limits(chip), chip)
    except devices.UnknownDevice as unknown:
        return f"no plan for {unknown}"
    except DoesNotFit as reason:
        return str(reason)
    return _engine_class()(plan, precision)


@lru_cache
def _engine_class() -> "type[TritonEngine]":
    from fused_rnn.triton_engine import TritonEngine  # which imports Triton

    return TritonEngine
