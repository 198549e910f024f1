"""Errors of fp32 in three bf16 parts on tensor cores, emulated on the CPU.

    python -m bench.split_accuracy [--cell lstm] [--hidden 64 256] [--steps 512]

One row per cell and size: errors against fp64, relative to the largest value, of the emulation and
of torch.nn in fp32 on the CPU. Tensor cores are taken for worse than they are: each of the 16
products of an instruction, and the sum before it, is cut off at 24 bits below the largest of them,
and so is their sum. (NVIDIA does not document it; microbenchmarks found at least that many bits.)
"""

import argparse
from typing import Any

import torch
from torch import Tensor, nn

COLUMNS = 16  # of one mma instruction
PARTS = ((0, 2), (2, 0), (1, 1)), ((0, 1), (1, 0), (0, 0))  # two sums, the small terms first
CELLS: dict[str, Any] = {
    "rnn_tanh": nn.RNN,
    "rnn_relu": lambda *sizes: nn.RNN(*sizes, nonlinearity="relu"),
    "gru": nn.GRU,
    "lstm": nn.LSTM,
}


def split(x: Tensor) -> list[Tensor]:
    """Three bf16 tensors, in fp64, whose sum is x."""
    parts = []
    for _ in range(3):
        parts.append(x.bfloat16().double())
        x = x - parts[-1].float()
    return parts


def cut(x: Tensor, exponent: Tensor, bits: int) -> Tensor:
    """X without what is smaller than 2^(exponent - bits)."""
    unit = torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent - bits)
    return (x / unit).trunc() * unit


def mma(acc: Tensor, terms: Tensor) -> Tensor:
    """The sum of acc and of the products in the last dimension, as an instruction has it."""
    terms = torch.cat([acc[..., None], terms], -1)
    largest = torch.frexp(terms.abs().amax(-1)).exponent
    total = cut(terms, largest[..., None], 24).sum(-1)
    return cut(total, torch.frexp(total.abs()).exponent, 24)


def product(w: Tensor, x: Tensor, slices: int) -> Tensor:
    """W @ x of fp32 tensors, the columns of w cut into slices that are added in fp32."""
    ws, xs = split(w), split(x)
    sums = []
    for part in range(slices):
        K = w.shape[1] // slices
        at = slice(part * K, (part + 1) * K)
        for pairs in PARTS:
            acc = torch.zeros(w.shape[0], x.shape[1], dtype=torch.float64)
            for i, j in pairs:
                terms = ws[i][:, None, at] * xs[j].T[None, :, at]
                for k in range(0, K, COLUMNS):
                    acc = mma(acc, terms[..., k : k + COLUMNS])
            sums.append(acc.float())
    total = sums[0] + sums[1]
    for i in range(2, len(sums), 2):
        total += sums[i] + sums[i + 1]
    return total


class Emulated(torch.autograd.Function):
    """h W^T, and its gradient for h made in the same way."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, w: Tensor, slices: int) -> Tensor:
        ctx.save_for_backward(w)
        return product(w, h.T, slices).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (w,) = ctx.saved_tensors
        return product(w.T.contiguous(), grads[0].T, 1).T, None, None


def run(name: str, layer: Any, x: Tensor, slices: int) -> tuple[Tensor, Tensor]:
    """The output of a one-layer torch.nn module whose recurrent products are emulated.

    And zeros that were added to what these products and their biases give, for their gradients.
    """
    gates = (x @ layer.weight_ih_l0.T + layer.bias_ih_l0).unbind(0)
    zeros = x.new_zeros(*x.shape[:2], len(layer.bias_hh_l0)).requires_grad_()
    h = c = x.new_zeros(x.shape[1], layer.hidden_size)
    out = []
    for gx, zero in zip(gates, zeros.unbind(0), strict=True):
        gh = Emulated.apply(h, layer.weight_hh_l0, slices) + (layer.bias_hh_l0 + zero)
        if name == "gru":
            (xr, xz, xn), (hr, hz, hn) = gx.chunk(3, -1), gh.chunk(3, -1)
            z, n = (xz + hz).sigmoid(), (xn + (xr + hr).sigmoid() * hn).tanh()
            h = n + z * (h - n)
        elif name == "lstm":
            i, f, g, o = (gx + gh).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        else:
            h = torch.relu(gx + gh) if name == "rnn_relu" else torch.tanh(gx + gh)
        out.append(h)
    return torch.stack(out), zeros


def emulated(name: str, layer: Any, x: Tensor, grad: Tensor, slices: int) -> list[Tensor]:
    """Output and gradients: of x, w_ih, w_hh, b_ih, b_hh.

    That of w_hh is one product after the sweep, of PyTorch's: its factors are what is emulated, and
    fp64 adds no error of its own to theirs.
    """
    x = x.clone().requires_grad_()
    out, zeros = run(name, layer, x, slices)
    wanted = [x, layer.weight_ih_l0, layer.bias_ih_l0, zeros]
    dx, dw_ih, db_ih, dgates = torch.autograd.grad(out, wanted, grad)
    before = out.detach()[:-1].flatten(0, 1)
    dw_hh = dgates[1:].flatten(0, 1).double().T @ before.double()
    return [out.detach(), dx, dw_ih, dw_hh, db_ih, dgates.sum((0, 1))]


def errors(
    name: str, H: int, T: int, B: int = 4, slices: int = 1
) -> dict[str, tuple[float, float]]:
    """Errors of the emulation and of torch.nn, of the output and of all gradients."""
    torch.manual_seed(0)
    layer, x = CELLS[name](H, H), torch.randn(T, B, H)
    grad = torch.randn(T, B, H)
    exact = CELLS[name](H, H).double()
    exact.load_state_dict({k: v.double() for k, v in layer.state_dict().items()})

    def results(layer: Any, x: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        out = layer(x)[0]
        grads = torch.autograd.grad(out, [x, *layer.parameters()], grad.to(out.dtype))
        return [out.detach(), *grads]

    want = results(exact, x.double())
    found = emulated(name, layer, x, grad, slices), results(layer, x)
    names = ["out", "x", *(key for key, _ in layer.named_parameters())]
    table = {}
    for i, key in enumerate(names):
        ours, theirs = (float((f[i] - want[i]).abs().max() / want[i].abs().max()) for f in found)
        table[key] = ours, theirs
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cell", nargs="*", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--hidden", nargs="*", type=int, default=[64, 256])
    parser.add_argument("--steps", type=int, default=512)
    args = parser.parse_args()
    print("| cell | H | output: ours | torch.nn | worst gradient: ours | torch.nn |")
    print("|---|---|---|---|---|---|")
    for name in args.cell:
        for H in args.hidden:
            # A group's warps cut the columns, too.
            table = errors(name, H, args.steps, slices=1 if H <= 64 else 8)
            out = table.pop("out")
            worst = max(table.values(), key=lambda pair: pair[0] / pair[1])
            row = " | ".join(f"{e:.1e}" for e in (*out, *worst))
            print(f"| {name} | {H} | {row} |", flush=True)


if __name__ == "__main__":
    main()
