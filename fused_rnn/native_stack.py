"""The shortest way on a CPU: the whole stack of layers in one call of torch.nn's function.

It is asked first, before anything is set up: at the sizes for which it is there, that would cost as
much as the call. So it looks no closer than it must; whatever is out of the ordinary, wrong
arguments included, it leaves to the general path, which knows the words for every error.
:func:`fused_rnn.explain` asks the same function.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fused_rnn import native, transforms
from fused_rnn.checks import packed_rows
from fused_rnn.precision import autocast_dtype

if TYPE_CHECKING:
    from fused_rnn.base import FusedRNNBase


class Call(NamedTuple):
    """What torch.nn's function is called with.

    Attributes:
        reason: why it runs.
        x: the input, [T, B, I], [B, T, I] with ``batch_first``, or rows [N, I] if packed.
        states: the initial states [L*D, B, .], h alone or h and c, in the order of the rows.
        weights: the parameters in torch.nn's order.
        cast: whether autocast is on; types have been settled.
    """

    reason: str
    x: Tensor
    states: tuple[Tensor, ...]
    weights: list[Tensor]
    cast: bool


def prepare(layer: "FusedRNNBase", input: Any, hx: Any) -> Call | None:
    """The call for ``layer(input, hx)``, or None where it is left to the general path.

    Raises:
        RuntimeError: the parts of a PackedSequence do not fit each other.
    """
    if (
        layer.backend not in ("auto", "native")
        or layer.zoneout
        or layer.recurrent_dropout
        or layer.clip_recurrent_grad is not None
        or (layer.learn_h0 and hx is None)
        or transforms.active()
        or torch._C._len_torch_dispatch_stack()  # a counter of FLOPs, or a tracer
    ):
        return None
    names, sizes, count, widths, cell = layer._order
    own = layer._parameters
    try:
        weights: Any = [own[name] for name in names]
    except KeyError:  # a parametrization computes it
        return None
    w, dtype = weights[0], None
    packed = type(input) is PackedSequence
    x: Any = input.data if packed else input
    if cell not in native.FUNCTIONS or not isinstance(x, Tensor) or not x.is_cpu:
        return None
    if [p.shape for p in weights] != sizes:
        return None
    if torch.is_autocast_enabled("cpu"):
        dtype = autocast_dtype(x)
    kind = w.dtype
    if x.dtype is not kind and (dtype is None or kind is torch.float64):
        return None
    if not all([p.dtype is kind and p.is_cpu for p in weights]):
        return None
    shape = x.shape
    dims = len(shape)
    if shape[-1:] != sizes[0][1:] or x.numel() == 0 or not 1 < dims < (3 if packed else 4):
        return None
    if packed:
        rows = packed_rows(input)
        T, B, ragged = rows.T, rows.B, rows.batch_sizes is not None
    elif dims == 2:
        x, T, B, ragged = x.unsqueeze(0 if layer.batch_first else 1), shape[0], 1, False
    else:
        T, B, ragged = shape[layer.batch_first], shape[not layer.batch_first], False
    if hx is None:
        h0 = x.new_zeros(count, B, widths[0])
        states: tuple[Tensor, ...] = (h0,)
        if len(widths) == 2:
            states = h0, h0 if widths[0] == widths[1] else x.new_zeros(count, B, widths[1])
    else:
        unbatched = dims == 2 and not packed
        if type(hx) is not tuple or len(hx) != len(widths):
            return None
        for state, n in zip(hx, widths, strict=True):
            if not _fits(state, x, (count, n) if unbatched else (count, B, n), dtype):
                return None
        states = tuple([s.unsqueeze(1) for s in hx]) if unbatched else hx
    train = torch.is_grad_enabled() and (
        w.requires_grad or any([t.requires_grad for t in (x, *states, *weights)])
    )
    if train and layer.recompute:
        return None
    reason: str | None = "backend='native' asks for it"
    if layer.backend == "auto":
        how = (cell, dtype or kind, T, B, layer.hidden_size)
        projected = layer.proj_size > 0
        reason = native.suits(*how, ragged=ragged, projected=projected, train=train)
    if reason is None:
        return None
    if dtype is not None:
        x, weights = x.to(dtype), [p.to(dtype) for p in weights]
        states = tuple([s.to(dtype) for s in states])
    if packed and hx is not None and input.sorted_indices is not None:
        states = tuple([s.index_select(1, input.sorted_indices) for s in states])
    return Call(reason, x, states, weights, dtype is not None)


def _fits(state: Any, x: Tensor, size: tuple[int, ...], cast: torch.dtype | None) -> bool:
    """Whether an initial state goes with ``x``; under autocast with any type but fp64."""
    if not isinstance(state, Tensor) or state.shape != size or not state.is_cpu:
        return False
    return state.dtype is x.dtype or (cast is not None and state.dtype is not torch.float64)


def run(layer: "FusedRNNBase", input: Any, call: Call) -> tuple[Any, ...]:
    """``output`` and the final states of a prepared ``call`` for ``input``."""
    function = native.FUNCTIONS[layer._order[4]]
    hx: Any = call.states if len(call.states) == 2 else call.states[0]
    how = (layer.bias, layer.num_layers, layer.dropout, layer.training, layer.bidirectional)
    packed = type(input) is PackedSequence
    if layer.proj_size:
        native.expect_no_projection()
    arguments: tuple[Any, ...] = (call.x, hx, call.weights, *how, layer.batch_first)
    if packed:
        arguments = (call.x, input.batch_sizes, hx, call.weights, *how)
    if call.cast:
        with torch.autocast("cpu", enabled=False):
            out, *final = function(*arguments)
    else:
        out, *final = function(*arguments)
    if packed:
        _, sizes, order, back = input
        if back is not None:
            final = [s.index_select(1, back) for s in final]
        return PackedSequence(out, sizes, order, back), tuple(final)
    if input.dim() == 2:
        return out.squeeze(0 if layer.batch_first else 1), tuple([s.squeeze(1) for s in final])
    return out, tuple(final)
