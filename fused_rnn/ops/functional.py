"""One recurrent layer as a function of tensors, by whichever way the call has to go.

:func:`describe` says what is to be computed, :func:`route_of` which way and by which engine, and
:func:`run` goes it. :func:`fused_rnn.explain` asks the first two.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fused_rnn.engines.dispatch import Backend, Choice, choose
from fused_rnn.engines.flops import counted
from fused_rnn.engines.triton.engine import TritonEngine
from fused_rnn.engines.wavefront.forward import forward
from fused_rnn.engines.wavefront.stack import StackLayer, Wavefront, wavefront
from fused_rnn.engines.wavefront.streams import overlaps
from fused_rnn.ops import operators, segments, transforms
from fused_rnn.ops.autograd import LayerFunction, StackFunction
from fused_rnn.ops.segments import Segments
from fused_rnn.spec.batch import BatchLayout, TracedLayout
from fused_rnn.spec.cells import Cell
from fused_rnn.spec.context import exporting, transformed
from fused_rnn.spec.layer import NO_TENSORS, LayerInputs, LayerSpec, Outputs, Weights
from fused_rnn.spec.options import NO_OPTIONS, CallOptions, Draw, settle, without_padding
from fused_rnn.spec.precision import autocast_dtype, without_autocast


def rnn_layer(
    cell: Cell,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Weights],
    layout: BatchLayout,
    backend: Backend = "auto",
    *,
    recompute: bool = False,
    from_zero: bool = False,
    options: CallOptions = NO_OPTIONS,
) -> Outputs:
    """Run one recurrent layer over a batch of sequences.

    Under autocast everything is computed in the autocast dtype. (``nn.LSTM`` takes fp16 on a GPU,
    even where autocast is set to bf16.)

    Args:
        cell: the cell, as of :mod:`fused_rnn.cells.builtin`.
        x: input rows [N, I] in order of time, see :class:`fused_rnn.spec.batch.BatchLayout`.
        h0: initial hidden state [D, B, R], with R the projection size or else H.
        c0: initial cell state [D, B, H], or None for a cell without one.
        weights: parameters of each of the D directions; the second one sweeps in reverse.
        layout: where the rows of each time step lie.
        backend: "auto", "triton", "cpu", "native" (torch.nn's own kernels) or "eager".
        recompute: save only the states for backward and compute the gates a second time.
        from_zero: the initial states are zeros; saves a product in backward.
        options: lengths, resets, zoneout and the like.

    Returns:
        out [N, D*R], h_n [D, B, R], c_n [D, B, H] or None, c_seq [N, D*H] or None

    Raises:
        RuntimeError: ``backend`` cannot run this layer.
        ValueError: ``backend`` is not a backend's name.
    """
    spec, inputs = describe(
        cell,
        x,
        h0,
        c0,
        weights,
        layout,
        recompute=recompute,
        from_zero=from_zero,
        options=options,
        dtype=autocast_dtype(x),
    )
    with without_autocast(x.device):
        return run(spec, inputs, backend)


def describe(
    cell: Cell,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Weights],
    layout: BatchLayout | TracedLayout,
    *,
    recompute: bool,
    from_zero: bool,
    options: CallOptions,
    dtype: torch.dtype | None,
    draw: Draw | None = None,
) -> tuple[LayerSpec, LayerInputs]:
    """What is to be computed by :func:`rnn_layer` of these arguments, types settled.

    Args:
        cell: the cell, as of :mod:`fused_rnn.cells.builtin`.
        x: input rows [N, I] in order of time; while they are traced [T, B, I].
        h0: initial hidden state [D, B, R], with R the projection size or else H.
        c0: initial cell state [D, B, H], or None for a cell without one.
        weights: parameters of each of the D directions; the second one sweeps in reverse.
        layout: where the rows of each time step lie; while it is traced, what a tracer knows of it.
        recompute: save only the states for backward and compute the gates a second time.
        from_zero: the initial states are zeros; saves a product in backward.
        options: lengths, resets, zoneout and the like.
        dtype: in which all is to be computed, None for the inputs' own.
        draw: draws the masks; by default as the options say.
    """
    settled, tensors = None, NO_TENSORS
    if options is not NO_OPTIONS:
        settled, tensors = settle(options, cell, x, h0, c0, draw)
        if options.lengths is not None:
            x = without_padding(x, options.lengths)
    inputs = LayerInputs(x, h0, c0, tuple(weights), tensors)
    if dtype is not None:
        inputs = inputs.map(lambda t: t.to(dtype) if t.is_floating_point() else t)
    w = weights[0]
    spec = LayerSpec(
        cell,
        layout,  # type: ignore[arg-type]  # a tracer's goes no further than the operators
        len(weights),
        w.w_ih.shape[0] // cell.blocks,
        projected=w.w_hr is not None,
        recompute=recompute,
        options=settled,
        from_zero=from_zero,
        heads=1 if w.w_hh.dim() == 2 else w.w_hh.shape[0],
    )
    return spec, inputs


class Route(NamedTuple):
    """The way that a call goes.

    Attributes:
        way: "transformed" (by torch.func), "recorded" (by autograd) or "plain".
        choice: what runs, and why.
        spec: what it is given: the layer, or its segments as a packed batch.
        inputs: the tensors of that.
        segments: if it is the segments.
    """

    way: Literal["transformed", "recorded", "plain"]
    choice: Choice
    spec: LayerSpec
    inputs: LayerInputs
    segments: Segments | None = None


def route_of(spec: LayerSpec, inputs: LayerInputs, backend: Backend) -> Route:
    """The way of a call that is not traced.

    Raises:
        RuntimeError: ``backend`` cannot run this layer.
        ValueError: ``backend`` is not a backend's name.
    """
    device, dtype = inputs.x.device, inputs.x.dtype
    if spec.layout.B == 0:
        return Route("plain", _nothing("the batch is empty: there is nothing to run"), spec, inputs)
    if transformed():
        choice = transforms.choice_of(spec, device, dtype, backend)
        return Route("transformed", choice, spec, inputs)
    parts = None
    if spec.options is not None and segments.suit(spec, inputs, backend):
        if segments.are_restarts(spec, inputs):
            spec, inputs = segments.restarted(spec, inputs)
        else:
            parts = Segments.of(spec.layout, inputs.options)
            if parts is None:
                return Route(
                    "plain", _nothing("all lengths are 0: there is nothing to run"), spec, inputs
                )
            spec, inputs = parts.pack(spec, inputs)
    record = torch.is_grad_enabled() and any(
        [t is not None and t.requires_grad for t in inputs.flatten()]
    )
    choice = choose(spec, device, dtype, backend, record, autograd_records=True)
    return Route("recorded" if record else "plain", choice, spec, inputs, parts)


def run(
    spec: LayerSpec, inputs: LayerInputs, backend: Backend, route: Route | None = None
) -> Outputs:
    """Run one layer, as :func:`describe` returns it; autocast is off.

    Args:
        spec: the layer.
        inputs: its tensors.
        backend: what the user asks for.
        route: what :func:`route_of` said of these, if it has been asked.

    Raises:
        RuntimeError: ``backend`` cannot run this layer.
        ValueError: ``backend`` is not a backend's name.
    """
    if isinstance(spec.layout, TracedLayout):
        return operators.run([(spec, inputs)], backend)
    route = route or route_of(spec, inputs, backend)
    engine = route.choice.engine
    if route.way == "transformed":
        return transforms.run(spec, inputs, backend, engine)
    if engine is None:
        outputs = _without_engine(route)
    elif route.way == "recorded":
        outputs = Outputs(*LayerFunction.apply(engine, route.spec, *route.inputs.flatten()))
    else:
        outputs, _ = counted(engine).forward(route.spec, route.inputs, save=False)
    return outputs if route.segments is None else route.segments.outputs(outputs, inputs)


def wavefront_of(
    route: Route,
    backend: Backend,
    layers: int,
    dropout: float,
    record: bool,
    cells: bool,
) -> Wavefront | str:
    """How a stack of layers overlaps whose first one goes by ``route``; or why it does not.

    Args:
        route: of the first layer.
        backend: what the user asks for.
        layers: of the stack, each as the first.
        dropout: probability with which the output of each layer but the last is dropped.
        record: whether a gradient of any of them may be asked for.
        cells: whether c of all steps of the last one is an output.
    """
    choice, spec, x = route.choice, route.spec, route.inputs.x
    if record and route.way == "plain" and choice.engine is not None:  # the first one is frozen
        choice = choose(spec, x.device, x.dtype, backend, True, autograd_records=True)
    if not isinstance(choice.engine, TritonEngine) or route.way == "transformed":
        return f"{choice.backend} runs them"
    if refusal := apart(spec, route.inputs, cells):
        return refusal
    if route.segments is not None:
        return "segments are packed layer by layer"
    if not overlaps(x.device):
        return f"there are no streams on {x.device}"
    if torch._C._len_torch_dispatch_stack():
        return "something watches each operation"
    return wavefront(choice.engine, spec, x, layers, dropout, record)


def traced_together(spec: LayerSpec, inputs: LayerInputs, backend: Backend, cells: bool) -> bool:
    """Whether a traced stack is one operator, in which its layers may overlap; as :func:`apart`.

    An exported graph may run anywhere: there each layer has its own.
    """
    asked = backend in ("auto", "triton") and overlaps(inputs.x.device) and not exporting()
    return asked and apart(spec, inputs, cells) is None


def apart(spec: LayerSpec, inputs: LayerInputs, cells: bool) -> str | None:
    """Why the layers of a stack cannot overlap, each like the first, on whatever GPU they run.

    ``cells``: whether c of all steps of the last one is an output.
    """
    if spec.directions > 1:
        return "a layer of two directions ends at both ends of time"
    if spec.recompute:
        return "recompute=True keeps the gates of one layer at a time"
    if spec.heads > 1:
        return "it has heads"
    options = inputs.options
    if options.zone_h is not None or options.drop is not None:
        return "each layer draws its masks in turn"
    if cells:
        return "c of all steps is asked for"
    H, anywhere = spec.hidden_size, spec.layout.batch_sizes is not None
    anywhere = anywhere and (H * inputs.x.itemsize % 16 > 0 or options.reset is not None)
    if anywhere or (spec.cell.parameters and H % 4):
        return "its pieces would not begin at 16 bytes"
    return None


def run_stack(wave: Wavefront, layers: Sequence[StackLayer]) -> Outputs:
    """Run a stack whose layers overlap; autocast is off."""
    flat = list(chain.from_iterable(inputs.flatten() for _, inputs in layers))
    if not (torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in flat])):
        return Outputs(*forward(wave, layers, len(layers))[:3])
    specs = [spec for spec, _ in layers]
    return Outputs(*StackFunction.apply(wave, specs, *flat))


def _without_engine(route: Route) -> Outputs:
    """Run what autograd records and differentiates itself."""
    loop = route.choice.run
    assert loop is not None
    if route.spec.recompute and route.way == "recorded":
        kept: Any = checkpoint(loop, route.spec, route.inputs, use_reentrant=False)
        return Outputs(*kept)
    return loop(route.spec, route.inputs)


def _nothing(reason: str) -> Choice:
    return Choice("eager", reason, run=_no_steps)


def _no_steps(spec: LayerSpec, inputs: LayerInputs) -> Outputs:
    """No steps at all, as in an empty batch: states stay, and all gradients but theirs are zeros.

    Zeros, not None, for everything that is differentiable.
    """
    x, h0, c0, *_ = inputs
    # Sums of no elements, so that a parameter that is not finite does no harm.
    tensors = [t for t in inputs.flatten() if t is not None and t.is_floating_point()]
    zero = torch.stack([t.narrow(0, 0, 0).sum() for t in tensors]).sum()

    def rows_of(state: Tensor) -> Tensor:
        return x.new_zeros(spec.layout.N, spec.directions * state.shape[-1]) + zero

    cells = spec.options is not None and spec.options.cells
    return Outputs(
        rows_of(h0),
        h0 + zero,
        None if c0 is None else c0 + zero,
        rows_of(c0) if cells and c0 is not None else None,
    )
