"""PyTorch's own fused CPU LSTM (oneDNN) as an engine, for the shapes where it is the faster one."""

import torch
from torch import Tensor

from fused_rnn.problem import Grads, Layer, OutputGrads, Outputs, Saved

_LSTM = 2  # torch's number for the cell


def why_not(layer: Layer, dtype: torch.dtype, projected: bool) -> str | None:
    """Why oneDNN does not run this layer, or None if it does.

    Measured on two Zen 3 cores, fp32: 1.1 to 3 times as fast in training as the PyTorch sweeps at
    every shape of ``python -m bench.run --shapes cpu``, so it is taken wherever it can be.
    """
    if layer.cell.name != "lstm":
        return "it has no such cell"
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return "torch.backends.mkldnn is off"
    if dtype != torch.float32:
        return f"it is used for float32, not for {dtype}"
    if layer.recompute:
        return "it saves its gates, which recompute=True forbids"
    if layer.rows.batch_sizes is not None:
        return "the sequences differ in length"
    if projected:
        return "it has no projection"
    return None


def forward(layer: Layer, inputs: Saved, save: bool) -> tuple[Outputs, Saved]:
    """See :class:`fused_rnn.problem.Engine`."""
    # The op keeps its workspace only where gradients are recorded, so it must believe that they
    # are; detached inputs make sure that nothing is.
    with torch.set_grad_enabled(save):
        return _forward(layer, _plain(inputs), save)


def saved_specs(layer: Layer, inputs: Saved) -> None:
    """See :class:`fused_rnn.problem.Engine`: oneDNN alone knows the size of its workspace."""
    return


def _plain(tensors: Saved) -> Saved:
    """Contiguous and detached: the op reads strided memory as if it were contiguous."""
    return tuple([None if t is None else t.detach().contiguous() for t in tensors])


def _forward(layer: Layer, inputs: Saved, save: bool) -> tuple[Outputs, Saved]:
    x, h0, c0, *flat = inputs
    assert x is not None
    assert h0 is not None
    assert c0 is not None
    rows = layer.rows
    steps = x.view(rows.T, rows.B, -1)
    per_direction = []
    saved: list[Tensor | None] = []
    for d, w in enumerate(layer.unflatten(flat)):
        bias = (w.b_ih, w.b_hh) if w.b_ih is not None else (_no_bias(w.w_hh), _no_bias(w.w_hh))
        out, h_n, c_n, workspace = torch.ops.aten.mkldnn_rnn_layer(
            steps,
            w.w_ih,
            w.w_hh,
            *bias,
            h0 if layer.directions == 1 else h0[d : d + 1],
            c0 if layer.directions == 1 else c0[d : d + 1],
            reverse=d == 1,
            batch_sizes=[],
            mode=_LSTM,
            hidden_size=h0.shape[-1],
            num_layers=1,
            has_biases=w.b_ih is not None,
            bidirectional=False,
            batch_first=False,
            train=save,
        )
        per_direction.append((out, h_n, c_n))
        if save:
            # The op's own backward wants its own outputs back. One direction has the first one as
            # `out`, and its c_n is the caller's, who may overwrite it; h_n is a step of the first.
            one = layer.directions == 1
            saved += [workspace, None if one else out, c_n.clone() if one else c_n]
    outs, h_ns, c_ns = zip(*per_direction, strict=True)
    if layer.directions == 1:
        return Outputs(outs[0].view(rows.N, -1), h_ns[0], c_ns[0]), tuple(saved)
    out = torch.cat(outs, dim=-1).view(rows.N, -1)
    return Outputs(out, torch.cat(h_ns), torch.cat(c_ns)), tuple(saved)


def backward(
    layer: Layer,
    inputs: Saved,
    out: Tensor,
    saved: Saved,
    grads: OutputGrads,
    needs: tuple[bool, ...],
) -> Grads:
    """See :class:`fused_rnn.problem.Engine`."""
    x, h0, c0, *flat = _plain(inputs)
    dout, dh_n, dc_n, _ = grads
    assert x is not None
    assert h0 is not None
    assert c0 is not None
    rows, H = layer.rows, h0.shape[-1]
    steps = x.view(rows.T, rows.B, -1)
    dx: Tensor | None = None
    dh0, dc0 = [], []
    dflat: list[Tensor | None] = []
    for d, w in enumerate(layer.unflatten(flat)):
        workspace, own, c_n = saved[3 * d : 3 * d + 3]
        states = out.view(rows.T, rows.B, H) if own is None else own
        bias = (w.b_ih, w.b_hh) if w.b_ih is not None else (_no_bias(w.w_hh), _no_bias(w.w_hh))
        step_grad = None
        if dout is not None:
            step_grad = dout[:, d * H : (d + 1) * H].reshape(rows.T, rows.B, H)
        dx_d, dw_ih, dw_hh, db_ih, db_hh, dh, dc = torch.ops.aten.mkldnn_rnn_layer_backward(
            steps,
            w.w_ih,
            w.w_hh,
            *bias,
            h0[d : d + 1],
            c0[d : d + 1],
            states,
            states[:1] if d == 1 else states[rows.T - 1 :],
            c_n,
            step_grad,
            None if dh_n is None else dh_n[d : d + 1].contiguous(),
            None if dc_n is None else dc_n[d : d + 1].contiguous(),
            reverse=d == 1,
            mode=_LSTM,
            hidden_size=H,
            num_layers=1,
            has_biases=w.b_ih is not None,
            train=True,
            bidirectional=False,
            batch_sizes=[],
            batch_first=False,
            workspace=workspace,
        )
        dx = dx_d if dx is None else dx.add_(dx_d)
        dh0.append(dh)
        dc0.append(dc)
        biases = (db_ih, db_hh) if w.b_ih is not None else (None, None)
        dflat += [dw_ih, dw_hh, *biases, None]
    assert dx is not None
    result = (dx.reshape(rows.N, -1), torch.cat(dh0), torch.cat(dc0), *dflat)
    return tuple(g if need else None for g, need in zip(result, needs, strict=True))


def _no_bias(w_hh: Tensor) -> Tensor:
    return w_hh.new_zeros(w_hh.shape[0])
