"""The shortest way: the whole stack of layers in one call of torch.nn's function, or of cuDNN.

It is asked first, before anything is set up: at the sizes for which it is there, that would cost as
much as the call. So it looks no closer than it must; whatever is out of the ordinary, wrong
arguments included, it leaves to the general path, which knows the words for every error.
:func:`fused_rnn.explain` asks the same function.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fused_rnn.engines import dispatch, native, native_rules
from fused_rnn.layers.checks import packed_layout
from fused_rnn.layers.parameters import RecurrentModule
from fused_rnn.ops import cudnn
from fused_rnn.spec.batch import BatchLayout
from fused_rnn.spec.context import transformed
from fused_rnn.spec.layer import LayerSpec
from fused_rnn.spec.precision import autocast_dtype


class Prepared(NamedTuple):
    """What torch.nn's function is called with.

    Attributes:
        reason: why it runs, as :func:`fused_rnn.explain` tells it.
        x: the input, [T, B, I], [B, T, I] with ``batch_first``, or rows [N, I] if packed.
        states: the initial states [L*D, B, .], h alone or h and c, in the order of the rows.
        weights: the parameters in torch.nn's order.
        cast: whether autocast is on; types have been settled.
        train: whether a gradient may be asked for.
        stack: what cuDNN is called with, None on a CPU.
    """

    reason: str
    x: Tensor
    states: tuple[Tensor, ...]
    weights: list[Tensor]
    cast: bool
    train: bool
    stack: cudnn.Stack | None = None


def prepare(module: RecurrentModule, input: Any, hx: Any) -> Prepared | None:
    """The call for ``module(input, hx)``, or None where it is left to the general path.

    Raises:
        RuntimeError: the parts of a PackedSequence do not fit each other.
    """
    weights = None if _unusual(module, hx) else _plain_weights(module)
    packed, dtype = type(input) is PackedSequence, None
    x: Any = input.data if packed else input
    if weights is None or not isinstance(x, Tensor) or not all([_beside(p, x) for p in weights]):
        return None
    by_cudnn = _suits_cudnn(module, x)
    if not (by_cudnn or x.is_cpu):
        return None
    if torch.is_autocast_enabled(x.device.type):
        dtype = autocast_dtype(x)
        if dtype is not None and by_cudnn:  # it would copy the weights all the same
            return None
    kind, shape = weights[0].dtype, x.shape
    if x.dtype is not kind and (dtype is None or kind is torch.float64):
        return None
    dims = len(shape)
    if not 1 < dims < (3 if packed else 4) or shape[-1] != module.input_size or x.numel() == 0:
        return None
    if packed:
        layout = packed_layout(input)
    elif dims == 2:
        x, layout = x.unsqueeze(0 if module.batch_first else 1), BatchLayout(shape[0], 1)
    else:
        layout = BatchLayout(shape[module.batch_first], shape[not module.batch_first])
    states = _states(module, x, layout.B, hx, dims == 2 and not packed, dtype)
    if states is None:
        return None
    train = torch.is_grad_enabled() and any([t.requires_grad for t in (*weights, x, *states)])
    if train and (module.recompute or (by_cudnn and _saving_is_watched())):
        return None
    reason = _reason(module, x, dtype or kind, layout, train)
    if reason is None:
        return None
    stack = _stack(module, layout, packed) if by_cudnn else None
    if dtype is not None:
        x, weights = x.to(dtype), [p.to(dtype) for p in weights]
        states = tuple([s.to(dtype) for s in states])
    if packed and hx is not None and input.sorted_indices is not None:
        states = tuple([s.index_select(1, input.sorted_indices) for s in states])
    return Prepared(reason, x, states, weights, dtype is not None, train, stack)


def _reason(
    module: RecurrentModule, x: Tensor, dtype: torch.dtype, layout: BatchLayout, train: bool
) -> str | None:
    """Why torch.nn's function runs; None where something else does."""
    if module.backend == "native":
        return native.because("backend='native' asks for it")
    cell, projected = module._cell, module.proj_size > 0
    if x.is_cpu:
        how = (cell, dtype, layout.T, layout.B, module.hidden_size)
        ragged = layout.batch_sizes is not None
        faster = native_rules.suits(*how, ragged=ragged, projected=projected, train=train)
        return None if faster is None else native.because(faster)
    spec = LayerSpec(cell, layout, module._directions, module.hidden_size, projected)
    choice = dispatch.choose(spec, x.device, dtype, "auto", train, autograd_records=True)
    return choice.reason if choice.backend == "native" else None


def _suits_cudnn(module: RecurrentModule, x: Tensor) -> bool:
    """Whether cuDNN may run the stack, and what the host spends beside it may count."""
    dropped = module.dropout > 0 and module.training and module.num_layers > 1
    return bool(
        x.is_cuda
        and not dropped  # it would take random numbers that no other engine can repeat
        and (module.backend == "native" or native_rules.may_suit_gpu(x.dtype, module.hidden_size))
        and native.cudnn()
        and torch.cudnn_is_acceptable(x)
        and 1 < max(x.shape[:-1], default=0) <= native.MOST_STEPS
    )


def _saving_is_watched() -> bool:
    """Whether somebody else decides what autograd keeps, as activation checkpointing does."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _stack(module: RecurrentModule, layout: BatchLayout, packed: bool) -> cudnn.Stack:
    sizes = module.hidden_size, module.proj_size, module.num_layers
    first = module.batch_first and not packed
    return cudnn.Stack(module._cell, *sizes, module.bidirectional, first, layout, packed)


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
    """The parameters in torch.nn's order, if all are plain and of one kind."""
    names, sizes, _, _ = module._sizes
    own = module._parameters
    try:
        weights: Any = [own[name] for name in names]
    except KeyError:  # a parametrization computes it
        return None
    if [p.shape for p in weights] != sizes:
        return None
    kind = weights[0].dtype
    return weights if all([p.dtype is kind for p in weights]) else None


def _beside(t: Tensor, x: Tensor) -> bool:
    """Whether a tensor is on the device of ``x``."""
    return t.is_cpu if x.is_cpu else t.device == x.device  # the latter takes longer


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
    if not isinstance(state, Tensor) or state.shape != size or not _beside(state, x):
        return False
    return state.dtype is x.dtype or (cast is not None and state.dtype is not torch.float64)


def call(module: RecurrentModule, input: Any, prepared: Prepared) -> tuple[Any, ...]:
    """``output`` and the final states of the ``prepared`` call, of the same ``input``."""
    packed = type(input) is PackedSequence
    _, x, states, weights, _, train, stack = prepared
    if stack is not None:
        flat = module.flat_memory(weights)
        out, *final = cudnn.run(stack, x, states, weights, flat, train)
    else:
        out, *final = _on_cpu(module, input, prepared)
    if packed:
        _, sizes, order, back = input
        if back is not None:
            final = [s.index_select(1, back) for s in final]
        return PackedSequence(out, sizes, order, back), tuple(final)
    if input.dim() == 2:
        return out.squeeze(0 if module.batch_first else 1), tuple([s.squeeze(1) for s in final])
    return out, tuple(final)


def _on_cpu(module: RecurrentModule, input: Any, prepared: Prepared) -> tuple[Tensor, ...]:
    """The outputs of torch.nn's function."""
    functions = module._cell.torch
    assert functions is not None
    hx: Any = prepared.states if len(prepared.states) == 2 else prepared.states[0]
    how = (module.bias, module.num_layers, module.dropout, module.training, module.bidirectional)
    if module.proj_size:
        native.expect_no_projection()
    arguments: tuple[Any, ...] = (prepared.x, hx, prepared.weights, *how, module.batch_first)
    if type(input) is PackedSequence:
        arguments = (prepared.x, input.batch_sizes, hx, prepared.weights, *how)
    with torch.autocast("cpu", enabled=False) if prepared.cast else nullcontext():
        outputs: tuple[Tensor, ...] = functions.layer(*arguments)
    return outputs
