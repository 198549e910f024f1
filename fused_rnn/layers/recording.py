"""A layer as torch.jit.trace and torch.fx record it, which look for torch.nn's layers.

Both would follow the code into the time loop and fix T and B, or fail there. The one gets
torch.nn's own function for the layer, the other a single node that calls the module.
"""

from typing import Any

import torch
from torch import fx, nn
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence

from fused_rnn.layers.parameters import RecurrentModule

_PLAIN: dict[str, type[nn.RNNBase]] = {
    "RNN_TANH": nn.RNN,
    "RNN_RELU": nn.RNN,
    "GRU": nn.GRU,
    "LSTM": nn.LSTM,
}
_CONFIG = (
    "mode",
    "input_size",
    "hidden_size",
    "num_layers",
    "bias",
    "batch_first",
    "dropout",
    "bidirectional",
    "proj_size",
    "training",
    "_flat_weights",
    "_flat_weights_names",
    "_all_weights",
)


class Tracer(fx.Tracer):
    """A tracer of torch.fx to which fused layers are leaves, as torch.nn's are to any.

    ``torch.fx.symbolic_trace`` takes them for code of the user's own; a layer without hooks makes a
    single node of itself there, too. Hooks would be recorded, and run again by the node.

    Example:
        >>> from fused_rnn import FusedGRU, Tracer
        >>> model = torch.nn.Sequential(FusedGRU(3, 5))
        >>> traced = torch.fx.GraphModule(model, Tracer().trace(model))
        >>> traced(torch.randn(4, 2, 3))[0].shape
        torch.Size([4, 2, 5])
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a call of ``m`` is one node of the graph."""
        return isinstance(m, RecurrentModule) or super().is_leaf_module(m, module_qualified_name)


def recording(input: Any) -> bool:
    """Whether torch.jit.trace or torch.fx records the call of a layer on ``input``."""
    return torch.jit.is_tracing() or isinstance(input, Proxy)  # type: ignore[attr-defined]


def record(
    layer: RecurrentModule,
    input: Any,
    hx: Any,
    keywords: dict[str, Any],
    return_cell_sequence: bool,
) -> tuple[Any, ...]:
    """``output``, the final states, and c of all steps if it is asked for, as recorded.

    Raises:
        RuntimeError: torch.jit.trace records a layer that does what torch.nn's cannot.
        TypeError: torch.fx traces the layer itself, not a model that it is in; or the layer has
            hooks, and the tracer is not :class:`Tracer`.
    """
    if isinstance(input, Proxy):
        return _node(layer, input, hx, keywords, return_cell_sequence)
    used = {
        "zoneout": layer.zoneout > 0,
        "recurrent_dropout": layer.recurrent_dropout > 0 and layer.training,
        "clip_recurrent_grad": bool(layer.clip_recurrent_grad) and torch.is_grad_enabled(),
        "return_cell_sequence": return_cell_sequence,
    }
    used |= {name: value is not None for name, value in keywords.items()}
    used |= {"heads": layer.heads > 1, f"cell {layer._cell.name}": layer._cell.torch is None}
    if any(used.values()):
        names = ", ".join(name for name, there in used.items() if there)
        raise RuntimeError(f"torch.jit.trace records torch.nn's layer, which has no {names}")
    lstm = layer._cell.has_c
    cls = _PLAIN[layer.mode.upper()]
    plain = cls.__new__(cls)
    nn.Module.__init__(plain)
    config = {name: getattr(layer, name) for name in _CONFIG}
    plain.__setstate__(config | {"mode": layer.mode.upper()})
    if hx is None and layer.learn_h0:
        hx = _learned(layer, input)
    elif hx is not None and not lstm:
        (hx,) = hx
    output, final = plain.forward(input, hx)
    return output, final if lstm else (final,)


def _learned(layer: RecurrentModule, input: Any) -> Any:
    """The learned initial states as ``hx``, which follows the batch size of each call."""
    learned = [getattr(layer, name) for name in layer._initial_names]
    packed = isinstance(input, PackedSequence)
    if packed or input.dim() == 3:
        B = input.batch_sizes[0] if packed else input.size(0 if layer.batch_first else 1)
        learned = [s[:, None].expand(-1, B, -1) for s in learned]
    return tuple(learned) if len(learned) > 1 else learned[0]


def _node(
    layer: RecurrentModule,
    input: Proxy,
    hx: Any,
    keywords: dict[str, Any],
    return_cell_sequence: bool,
) -> tuple[Any, ...]:
    """The call as a node of torch.fx, as its tracer makes one of torch.nn's layers."""
    tracer = input.tracer
    path = tracer.path_of_module(layer) if isinstance(tracer, fx.Tracer) else ""
    if not path:
        raise TypeError(
            "torch.fx can trace a model that calls a fused layer, not the layer itself: "
            "it is one node"
        )
    if layer._forward_hooks or layer._forward_pre_hooks:
        raise TypeError(
            "torch.fx.symbolic_trace would run the hooks of a fused layer twice; make it a leaf: "
            "torch.fx.GraphModule(model, fused_rnn.Tracer().trace(model))"
        )
    states, own = layer._cell.states, "cell" in layer.__dict__
    keywords = {name: value for name, value in keywords.items() if value is not None}
    if hx is not None:
        keywords["hx"] = hx if len(states) > 1 else hx[0]
    if return_cell_sequence:
        keywords["return_state_sequences" if own else "return_cell_sequence"] = True
    node: Any = tracer.create_proxy("call_module", path, (input,), keywords)
    final = tuple([node[1][i] for i in range(len(states))]) if len(states) > 1 else (node[1],)
    if not return_cell_sequence:
        return node[0], final
    others = [node[2][i] for i in range(len(states) - 1)] if own else [node[2]]
    return (node[0], final, *others)
