"""What would run for a layer and an input, and why."""

import inspect
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fused_rnn import native, native_stack, transforms, triton_backend
from fused_rnn.base import FusedRNNBase, States
from fused_rnn.dispatch import Backend, choose
from fused_rnn.functional import restarts_suit, stretches_suit
from fused_rnn.layers import FusedGRU, FusedLSTM
from fused_rnn.precision import autocast_dtype, rnn_precision
from fused_rnn.problem import Extras, Layer, Masks, Weights
from fused_rnn.rows import Rows
from fused_rnn.stretches import Stretches


@dataclass(frozen=True)
class Explanation:
    """What runs one layer of a stack.

    Attributes:
        layer: its number, from 0 at the input.
        backend: "triton", "cpu", "native" or "eager".
        reason: why, and for Triton by what plan.
    """

    layer: int
    backend: str
    reason: str

    def __str__(self) -> str:
        return f"layer {self.layer}: {self.backend}: {self.reason}"


class Explanations(tuple[Explanation, ...]):
    """One :class:`Explanation` for each layer; prints one line for each."""

    def __str__(self) -> str:
        return "\n".join(map(str, self))


def problem_of(
    layer: FusedRNNBase, x: Tensor | PackedSequence
) -> tuple[Layer, torch.device, torch.dtype]:
    """What a backend would be given of ``layer`` and ``x``: the problem, its device and dtype.

    Raises:
        TypeError: ``layer`` is not a fused layer.
        ValueError: ``x`` does not fit the layer, as in a call; so RuntimeError.
    """
    first, *_ = _problems(layer, x, {})
    return first.layer, first.device, first.dtype


# What a call takes, without and with c; a subclass may take something else.
_CALLS = tuple(inspect.signature(cls.forward) for cls in (FusedGRU, FusedLSTM))


class _Problem(NamedTuple):
    """One layer of a stack as a backend is given it.

    Attributes:
        layer: the problem.
        masks: of what comes with the call, and whether units are dropped.
        device: on which it runs.
        dtype: in which it runs.
        record: whether a gradient may be asked for.
    """

    layer: Layer
    masks: Masks
    device: torch.device
    dtype: torch.dtype
    record: bool


def _problems(
    layer: FusedRNNBase, x: Tensor | PackedSequence, call: dict[str, Any]
) -> list[_Problem]:
    """The layers of the stack, bottom up, after the checks of the call itself."""
    if not isinstance(layer, FusedRNNBase):
        raise TypeError(f"a fused layer is needed, got {type(layer).__name__}")
    found: list[_Problem] = []

    def stack(
        x: Tensor,
        states: States,
        rows: Rows,
        weights: list[list[Weights]],
        learned: States | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        cells: bool,
        from_zero: bool,
    ) -> tuple[tuple[Tensor, ...], States]:
        grad = torch.is_grad_enabled()
        record = grad and any(t.requires_grad for t in (x, *states, *(learned or ())))
        zoned, dropped = layer.zoneout > 0, layer.training and layer.recurrent_dropout > 0
        clip = layer.clip_recurrent_grad if grad else None
        masks = Masks(lengths, reset, drop=states[0] if dropped else None)
        for number, directions in enumerate(weights):
            tensors = [t for w in directions for t in w if t is not None]
            record = record or (grad and any(t.requires_grad for t in tensors))
            extras = Extras(zoned, clip=clip, cells=cells and number == layer.num_layers - 1)
            more = extras != Extras() or any(t is not None for t in masks)
            how = layer._cell, rows, layer._directions, layer.recompute, extras if more else None
            dtype = autocast_dtype(x) or x.dtype
            found.append(_Problem(Layer(*how), masks, x.device, dtype, record))
        return (x,), states

    hx, rest = _arguments(layer, x, call)
    layer._run(x, hx, **rest, stack=stack)
    return found


def _arguments(
    layer: FusedRNNBase, x: Tensor | PackedSequence, call: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """``hx`` as ``layer._run`` takes it, and what else comes with a call."""
    given = _CALLS[layer._cell.has_c].bind(layer, x, **call).arguments
    del given["self"], given["input"]
    hx = given.pop("hx", None)
    return hx if hx is None or layer._cell.has_c else (hx,), given


def explain(
    layer: FusedRNNBase, x: Tensor | PackedSequence, gpu: int | str | None = None, **call: Any
) -> Explanations:
    """Tell which backend would run ``layer(x, **call)``, and why. The layer is not run.

    It is about a call at this place: gradients, training, autocast and transforms of torch.func
    are taken as they are. Compiled and exported layers have no stretches, and in training no choice
    that depends on T.

    Args:
        layer: a fused layer.
        x: an input that it accepts.
        gpu: ask for the kernels on a GPU that need not be here: 80, 86, 89, 90, 100, 120 or
            "gfx942".
        **call: what else the call takes: ``hx``, ``lengths``, ``mask``, ``reset``,
            ``return_cell_sequence``.

    Raises:
        TypeError: ``layer`` is not a fused layer, or its call has no such argument.
        ValueError: ``x`` or what comes with it does not fit the layer, as in a call, or ``gpu`` is
            not known; so RuntimeError, also where the call would raise it for its ``backend``.
    """
    problems = _problems(layer, x, call)
    H, projected = layer.hidden_size, layer.proj_size > 0
    hx, rest = _arguments(layer, x, call)
    whole = None
    if gpu is None and not any(value is not None and value is not False for value in rest.values()):
        whole = native_stack.prepare(layer, x, hx)
    if whole is not None:
        chosen = [("native", native.because(whole.reason))] * len(problems)
    elif gpu is None:
        chosen = [_here(problem, H, projected, layer.backend) for problem in problems]
    else:
        chosen = [_on_gpu(problem, H, projected, layer.backend, gpu) for problem in problems]
    return Explanations(Explanation(number, *found) for number, found in enumerate(chosen))


def _here(problem: _Problem, H: int, projected: bool, backend: Backend) -> tuple[str, str]:
    """The backend that runs a problem on this machine, and the reason."""
    layer, masks, device, dtype, record = problem
    if layer.rows.B == 0:
        return "eager", "the batch is empty: there is nothing to run"
    what = device, dtype, H, projected, backend
    if transforms.active():
        if transforms.needs_loop(layer):
            return "eager", "the loop of PyTorch calls, into which a transform can look"
        choice = choose(layer, *what)
        return choice.backend, choice.reason
    prefix = ""
    if backend in ("auto", "cpu", "native") and stretches_suit(layer, masks, device):
        rows = layer.rows
        if not restarts_suit(layer, masks):
            stretches = Stretches.of(rows, masks)
            if stretches is None:
                return "eager", "all lengths are 0: there is nothing to run"
            rows, prefix = stretches.rows, "stretches as a packed batch, "
        layer = Layer(layer.cell, rows, layer.directions, layer.recompute)
    choice = choose(layer, *what, record, recorder=True)
    return choice.backend, prefix + choice.reason


def _on_gpu(
    problem: _Problem, H: int, projected: bool, backend: Backend, gpu: int | str
) -> tuple[str, str]:
    """What runs on a GPU that need not be here, be it asked for by name or by "auto"."""
    layer, _, _, dtype, record = problem
    torchs = native.why_not(layer, torch.device("cuda"))
    if refusal := triton_backend.refusal(dtype, projected):
        return _instead(torchs, refusal)
    from fused_rnn.kernels.plan import LIMITS, DoesNotFit
    from fused_rnn.tuning import Request, planned

    if gpu not in LIMITS:
        raise ValueError(f"gpu {gpu!r} is not known. Select from {list(LIMITS)}.")
    request = Request.of(layer, H, dtype, rnn_precision())
    try:
        plan = planned(request, LIMITS[gpu])[0]
    except DoesNotFit as refusal:
        return _instead(torchs, str(refusal))
    faster = None
    saving = record and layer.recompute
    if backend == "auto" and not (torchs or saving or isinstance(gpu, str)):
        faster = native.suits_gpu(request, plan, layer.rows, record)
    return ("native", native.because(faster)) if faster else ("triton", plan.reason)


def _instead(torchs: str | None, refusal: str) -> tuple[str, str]:
    """What runs on a GPU where there is no kernel; ``torchs`` speaks against torch.nn's own."""
    reason = f"no fused kernel: {refusal}"
    return ("eager", reason) if torchs else ("native", native.because(reason))
