"""The shortest way on a CPU: the whole stack of layers in one call of torch.nn's function.

It is asked first, before anything is set up: at the sizes for which it is there, that would cost as
much as the call. So it looks no closer than it must; whatever is out of the ordinary, wrong
arguments included, it leaves to the general path, which knows the words for every error.
:func:`fused_rnn.explain` asks the same function.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fused_rnn.engines import native, native_rules
from fused_rnn.layers.checks import packed_layout
from fused_rnn.layers.parameters import RecurrentModule
from fused_rnn.spec.context import transformed
from fused_rnn.spec.precision import autocast_dtype


class Prepared(NamedTuple):
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


def prepare(module: RecurrentModule, input: Any, hx: Any) -> Prepared | None:
    """The call for ``module(input, hx)``, or None where it is left to the general path.

    Raises:
        RuntimeError: the parts of a PackedSequence do not fit each other.
    """
    weights = None if _unusual(module, hx) else _plain_weights(module)
    packed, dtype = type(input) is PackedSequence, None
    x: Any = input.data if packed else input
    if weights is None or not isinstance(x, Tensor) or not x.is_cpu:
        return None
    if torch.is_autocast_enabled("cpu"):
        dtype = autocast_dtype(x)
    kind, shape = weights[0].dtype, x.shape
    if x.dtype is not kind and (dtype is None or kind is torch.float64):
        return None
    dims = len(shape)
    if not 1 < dims < (3 if packed else 4) or shape[-1] != module.input_size or x.numel() == 0:
        return None
    if packed:
        layout = packed_layout(input)
        T, B, ragged = layout.T, layout.B, layout.batch_sizes is not None
    elif dims == 2:
        x, T, B, ragged = x.unsqueeze(0 if module.batch_first else 1), shape[0], 1, False
    else:
        T, B, ragged = shape[module.batch_first], shape[not module.batch_first], False
    states = _states(module, x, B, hx, dims == 2 and not packed, dtype)
    if states is None:
        return None
    train = torch.is_grad_enabled() and any([t.requires_grad for t in (*weights, x, *states)])
    if train and module.recompute:
        return None
    reason: str | None = "backend='native' asks for it"
    if module.backend == "auto":
        how = (module._cell, dtype or kind, T, B, module.hidden_size)
        projected = module.proj_size > 0
        reason = native_rules.suits(*how, ragged=ragged, projected=projected, train=train)
    if reason is None:
        return None
    if dtype is not None:
        x, weights = x.to(dtype), [p.to(dtype) for p in weights]
        states = tuple([s.to(dtype) for s in states])
    if packed and hx is not None and input.sorted_indices is not None:
        states = tuple([s.index_select(1, input.sorted_indices) for s in states])
    return Prepared(reason, x, states, weights, dtype is not None)


def _unusual(module: RecurrentModule, hx: Any) -> bool:
    """Whether a call does what torch.nn's functions do not, or something looks on."""
    return bool(
        module.backend not in ("auto", "native")
        or module.zoneout
        or module.recurrent_dropout
        or module.clip_recurrent_grad is not None
        or (module.learn_h0 and hx is None)
        or module._cell.torch is None
        or module.heads > 1
        or transformed()
        or torch._C._len_torch_dispatch_stack()  # a counter of FLOPs, or a tracer
    )


def _plain_weights(module: RecurrentModule) -> list[Tensor] | None:
    """The parameters in torch.nn's order, if all are plain and of one kind, on the CPU."""
    names, sizes, _, _ = module._sizes
    own = module._parameters
    try:
        weights: Any = [own[name] for name in names]
    except KeyError:  # a parametrization computes it
        return None
    if [p.shape for p in weights] != sizes:
        return None
    kind = weights[0].dtype
    return weights if all([p.dtype is kind and p.is_cpu for p in weights]) else None


def _states(
    module: RecurrentModule,
    x: Tensor,
    B: int,
    hx: Any,
    unbatched: bool,
    cast: torch.dtype | None,
) -> tuple[Tensor, ...] | None:
    """The initial states [L*D, B, .]; None if ``hx`` does not fit."""
    _, _, rows, widths = module._sizes
    if hx is None:
        h0 = x.new_zeros(rows, B, widths[0])
        if len(widths) == 1:
            return (h0,)
        return h0, h0 if widths[0] == widths[1] else x.new_zeros(rows, B, widths[1])
    if type(hx) is not tuple or len(hx) != len(widths):
        return None
    for state, n in zip(hx, widths, strict=True):
        if not _fits(state, x, (rows, n) if unbatched else (rows, B, n), cast):
            return None
    return tuple([s.unsqueeze(1) for s in hx]) if unbatched else hx


def _fits(state: Any, x: Tensor, size: tuple[int, ...], cast: torch.dtype | None) -> bool:
    """Whether an initial state goes with ``x``; under autocast with any type but fp64."""
    if not isinstance(state, Tensor) or state.shape != size or not state.is_cpu:
        return False
    return state.dtype is x.dtype or (cast is not None and state.dtype is not torch.float64)


def call(module: RecurrentModule, input: Any, prepared: Prepared) -> tuple[Any, ...]:
    """``output`` and the final states of the ``prepared`` call, of the same ``input``."""
    functions = module._cell.torch
    assert functions is not None
    function = functions.layer
    hx: Any = prepared.states if len(prepared.states) == 2 else prepared.states[0]
    how = (module.bias, module.num_layers, module.dropout, module.training, module.bidirectional)
    packed = type(input) is PackedSequence
    if module.proj_size:
        native.expect_no_projection()
    arguments: tuple[Any, ...] = (prepared.x, hx, prepared.weights, *how, module.batch_first)
    if packed:
        arguments = (prepared.x, input.batch_sizes, hx, prepared.weights, *how)
    if prepared.cast:
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
        return out.squeeze(0 if module.batch_first else 1), tuple([s.squeeze(1) for s in final])
    return out, tuple(final)
