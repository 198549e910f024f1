"""Errors of ours and of torch.nn against fp64, by cell, type and length.

    python -m bench.accuracy [--plot docs/accuracy.png]

The reference is torch.nn in fp64 with the same parameters and the same input, both rounded to the
type first. An error is the RMS of the difference over the RMS of the reference: of the output, and
the largest one of the gradients of input and parameters (of a fixed random linear loss).
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fused_rnn
from bench.cases import CELLS, DTYPES, LAYERS, Case, products
from bench.report import NAMES, markdown
from fused_rnn.examples.common import default_device, device, require


@dataclass(frozen=True)
class Errors:
    """Relative RMS errors of one layer in one type."""

    case: Case
    who: str
    forward: float
    gradients: float


def results(layer: nn.Module, x: Tensor, weight: Tensor) -> list[Tensor]:
    """The output, then the gradients of input and parameters, in fp64."""
    x = x.detach().requires_grad_()
    out = layer(x)[0]
    wanted = [x, *layer.parameters()]
    grads = torch.autograd.grad(out, wanted, weight.to(out.dtype))
    return [t.detach().double() for t in (out, *grads)]


def relative(ours: Tensor, exact: Tensor) -> float:
    """RMS of the difference over RMS of the reference."""
    return float((ours - exact).norm() / exact.norm())


def errors(case: Case, device: torch.device, backend: str = "auto") -> list[Errors]:
    """Those of torch.nn and ours."""
    torch.manual_seed(0)
    plain = case.layer(device)
    x = torch.randn(case.T, case.B, case.I, device=device, dtype=case.torch_dtype)
    # Exact in every type, so that no rounding of it counts.
    weight = torch.randint(-4, 5, (case.T, case.B, case.H), device=device) / 4.0
    kind, extra = LAYERS[case.cell]
    exact_layer = kind(case.I, case.H, device=device, dtype=torch.float64, **extra)
    exact_layer.load_state_dict(plain.state_dict())
    fused: Any = fused_rnn.fuse(case.layer(device), backend=backend)  # type: ignore[arg-type]
    fused.load_state_dict(plain.state_dict())
    exact = results(exact_layer, x.double(), weight.double())
    measured = []
    with products(case.dtype):
        for who, layer in (("torch.nn", plain), ("fused_rnn", fused)):
            out, *grads = map(relative, results(layer, x, weight), exact)
            measured.append(Errors(case, who, out, max(grads)))
    return measured


def table(measured: Sequence[Errors]) -> str:
    """Markdown: a row for each cell, type and length."""
    rows = []
    for theirs, ours in zip(measured[::2], measured[1::2], strict=True):
        case = ours.case
        row = [NAMES[case.cell], case.dtype, str(case.T)]
        for name in ("forward", "gradients"):
            a, b = getattr(theirs, name), getattr(ours, name)
            row += [f"{a:.1e}", f"{b:.1e}", f"{b / a:.2f}" if a else "-"]
        rows.append(row)
    head = ["cell", "type", "T"]
    for name in ("output", "gradients"):
        head += [f"{name}: torch.nn", "ours", "ours / torch.nn"]
    return markdown(head, rows)


def plot(measured: Sequence[Errors], path: Path) -> None:
    """Error over length: a column for each cell, output above, gradients below."""
    from matplotlib.figure import Figure

    cells = list(dict.fromkeys(e.case.cell for e in measured))
    dtypes = list(dict.fromkeys(e.case.dtype for e in measured))
    figure = Figure(figsize=(3.4 * len(cells), 5.6), layout="constrained")
    axes = figure.subplots(2, len(cells), sharex=True, sharey=True, squeeze=False)
    for column, cell in enumerate(cells):
        for row, what in enumerate(("forward", "gradients")):
            ax = axes[row][column]
            for color, dtype in enumerate(dtypes):
                for who, style in (("torch.nn", "--"), ("fused_rnn", "-")):
                    mine = [e for e in measured if (e.case.cell, e.case.dtype) == (cell, dtype)]
                    mine = [e for e in mine if e.who == who]
                    x, y = [e.case.T for e in mine], [getattr(e, what) for e in mine]
                    label = f"{who} {dtype}"
                    ax.loglog(x, y, style, color=f"C{color}", marker=".", label=label)
            ax.grid(alpha=0.3)
            title = NAMES[cell] + (": gradients" if row else ": output")
            ax.set(title=title, xlabel="steps" if row else "")
        axes[0][0].set_ylabel("error relative to fp64")
        axes[1][0].set_ylabel("error relative to fp64")
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    types = ["fp32", "tf32", "fp16", "bf16"] if gpu else ["fp32", "bf16"]
    parser.add_argument("--cells", nargs="+", choices=LAYERS, default=list(CELLS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=types)
    parser.add_argument("--steps", nargs="+", type=int, default=[16, 64, 256, 1024, 4096])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=64, help="the input size, too")
    parser.add_argument("--device", type=device, default=default_device(), help="(%(default)s)")
    parser.add_argument("--backend", default="auto", help="fused_rnn's backend")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--plot", type=Path, help="also draw a picture")
    args = parser.parse_args(argv)
    require("tqdm", *(["matplotlib"] if args.plot else []))
    from tqdm import tqdm

    torch.set_num_threads(args.threads)
    cases = [
        Case(cell, dtype, T, args.batch, args.hidden, args.hidden)
        for cell in args.cells
        for dtype in args.dtypes
        for T in args.steps
    ]
    measured: list[Errors] = []
    for case in tqdm(cases, disable=not sys.stderr.isatty()):
        measured += errors(case, args.device, args.backend)
    print(f"B = {args.batch}, I = H = {args.hidden}, on {args.device}, torch {torch.__version__}\n")
    print(table(measured))
    if args.plot:
        plot(measured, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
