"""FlashRNN, haste and TorchRL, each behind one small adapter, where they are installed.

Written from their sources (1.0.8, 0.5 and 0.14.1). FlashRNN's adapter was held against torch.nn
with FlashRNN's own PyTorch loop; its kernels, haste and TorchRL have not run on a GPU yet. Whatever
they compute, `records.Line.difference` tells.
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import optional
from bench.adapter import Forward, Input, Provider, first
from bench.cases import Case
from bench.timing import Run

PEERS_CELLS = ("gru", "lstm")
HASTE_GATES = {"lstm": (0, 2, 1, 3), "gru": (1, 0, 2)}  # ifgo to igfo, rzn to zrn


class Peer(Provider):
    """What another package offers: one direction, one length, on a GPU."""

    exact = False
    module: str
    install: str
    dtypes: tuple[str, ...]

    def why_not(self, case: Case, mode: str, device: torch.device) -> str | None:
        if reason := optional.why_not(self.module, self.install):
            return reason
        if device.type != "cuda":
            return "it needs a GPU"
        if case.cell not in PEERS_CELLS:
            return "it has no such cell"
        if case.dtype not in self.dtypes:
            return f"it is not for {case.dtype}"
        return super().why_not(case, mode, device)

    def function(self, name: str) -> Any:
        """Something of the package, imported when it is wanted."""
        return getattr(importlib.import_module(self.module), name)


class FlashRNN(Peer):
    """FlashRNN's LSTM: its Triton kernels, or those that it compiles with nvcc."""

    module, install = "flashrnn", "pip install flashrnn"
    dtypes = ("bf16", "fp16", "tf32")
    loops = True

    def __init__(self, backend: str = "triton_fused") -> None:
        self.backend, self.name = backend, f"FlashRNN {backend}"

    def why_not(self, case: Case, mode: str, device: torch.device) -> str | None:
        if reason := super().why_not(case, mode, device):
            return reason
        if case.cell != "lstm":
            return "its fast kernels have no such cell"
        if self.backend == "triton_fused":
            import triton.language as tl

            if not hasattr(tl, "make_block_ptr"):
                return "its kernels need block pointers, which Triton 3.9 no longer has"
            if case.H & (case.H - 1):
                return "its kernels take powers of two"
        return None

    def input(self, x: Input) -> Input:
        assert isinstance(x, Tensor)
        return x.detach().transpose(0, 1).contiguous().requires_grad_(x.requires_grad)

    def output(self, out: Tensor) -> Tensor:
        return out.transpose(0, 1)

    def layer(self, plain: nn.RNNBase, case: Case) -> tuple[nn.Module, Forward]:
        run = self._loop(case)

        def forward(x: Tensor) -> Tensor:
            w_ih, w_hh, b_ih, b_hh = plain.parameters()
            wx = F.linear(x, w_ih).view(case.B, case.T, 4, 1, case.H)
            R, b = w_hh.view(4, 1, case.H, case.H), (b_ih + b_hh).view(4, 1, case.H)
            return run(wx, R, b).flatten(2)

        return plain, forward

    def sweep(self, case: Case, device: torch.device, train: bool) -> Run:
        how: dict[str, Any] = {"device": device, "dtype": case.torch_dtype, "requires_grad": train}
        wx = torch.randn(case.B, case.T, 4, case.heads, case.H, **how)
        R = torch.randn(4, case.heads, case.H, case.H, **how)
        b = torch.zeros(4, case.heads, case.H, **how)
        run = partial(self._loop(case), wx, R, b)
        dout = torch.randn(case.B, case.T, case.heads, case.H, device=device, dtype=wx.dtype)
        return (lambda: torch.autograd.grad(run(), [wx, R, b], dout)) if train else run

    def _loop(self, case: Case) -> Callable[..., Tensor]:
        name = str(case.torch_dtype).removeprefix("torch.")
        how = {"function": "lstm", "backend": self.backend, "dtype": name}
        flashrnn = self.function("flashrnn")
        return lambda wx, R, b: flashrnn(wx, R, b, **how)[0][0]


class Haste(Peer):
    """haste's LSTM and GRU, in the one type that both have."""

    name, module, install = "haste", "haste_pytorch", "build from github.com/lmnt-com/haste"
    dtypes = ("fp32",)

    def layer(self, plain: nn.RNNBase, case: Case) -> tuple[nn.Module, Forward]:
        layer: nn.Module = self.function(case.cell.upper())(case.I, case.H)

        def sorted_gates(p: Tensor) -> Tensor:
            return torch.cat([p.detach().chunk(len(order))[g] for g in order]).t()

        order = HASTE_GATES[case.cell]
        w_ih, w_hh, b_ih, b_hh = map(sorted_gates, plain.parameters())
        state = {"kernel": w_ih, "recurrent_kernel": w_hh, "bias": b_ih, "recurrent_bias": b_hh}
        if case.cell == "lstm":
            state["bias"] = b_ih + state.pop("recurrent_bias")
        layer.load_state_dict(state)
        return layer, first(layer)


class TorchRL(Peer):
    """TorchRL's Triton LSTM and GRU: fp32 tensors, products in bf16 or TF32."""

    name, module = "TorchRL", "torchrl.modules.tensordict_module._rnn_triton"
    install = "pip install torchrl"
    dtypes = ("bf16", "tf32", "fp32")

    def input(self, x: Input) -> Input:
        assert isinstance(x, Tensor)
        return x.detach().float().transpose(0, 1).contiguous().requires_grad_(x.requires_grad)

    def output(self, out: Tensor) -> Tensor:
        return out.transpose(0, 1)

    def layer(self, plain: nn.RNNBase, case: Case) -> tuple[nn.Module, Forward]:
        device = next(plain.parameters()).device
        layer = plain.float()
        zeros = torch.zeros(case.B, case.T, case.H, device=device)
        begins = torch.zeros(case.B, case.T, dtype=torch.bool, device=device)
        states = [zeros, zeros] if case.cell == "lstm" else [zeros]
        how = {
            "compute_dtype": case.torch_dtype,
            "input_precision": "ieee" if case.dtype == "fp32" else "tf32",
        }
        run = self.function(f"{case.cell}_triton")
        return layer, lambda x: run(x, *states, *layer.parameters(), begins, **how)[0]
