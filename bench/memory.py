"""Bytes that a layer saves for backward per step and sequence: ours, torch.nn's, the kernels'.

    python -m bench.memory

What torch.nn and the CPU engines save is counted by saved-tensor hooks: every storage once, the
parameters aside, the input and the output included. What the Triton engine saves is known without
a GPU, from the shapes that it declares. cuDNN's reserve space is counted where there is a GPU.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

import fused_rnn
from bench.cases import CELLS, DTYPES, Case
from fused_rnn.cells.builtin import CELLS as KNOWN
from fused_rnn.engines.triton.engine import TritonEngine
from fused_rnn.engines.triton.products import plan_request
from fused_rnn.examples.common import default_device, device
from fused_rnn.kernels.chips import LIMITS
from fused_rnn.kernels.planner import make_plan
from fused_rnn.spec.batch import BatchLayout
from fused_rnn.spec.layer import LayerInputs, LayerSpec, Weights


def saved_bytes(forward: Callable[[], Tensor], parameters: set[int]) -> int:
    """Bytes of the distinct storages that ``forward`` saves for backward, parameters aside."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()  # alive while counting, so that no storage is counted twice
    total = sum(storages.values())
    del kept
    return total


def saved_by(layer: nn.Module, run: Callable[[], Tensor]) -> int:
    """The same for a module, whose parameters are those that are not counted."""
    return saved_bytes(run, {p.untyped_storage().data_ptr() for p in layer.parameters()})


def kernel_bytes(case: Case, recompute: bool) -> int:
    """Bytes that the Triton engine saves: input, output, initial states, its own."""
    precision: Literal["ieee", "tf32"] = "ieee" if case.dtype == "fp32" else "tf32"
    size, D, cell = case.torch_dtype.itemsize, case.directions, KNOWN[case.cell]
    layout = BatchLayout(case.T, case.B)
    spec = LayerSpec(cell, layout, D, case.H, recompute=recompute)
    plan = make_plan(plan_request(spec, case.torch_dtype, precision), LIMITS[90])
    x = torch.empty(case.T * case.B, case.I, dtype=case.torch_dtype, device="meta")
    h0 = x.new_empty(D, case.B, case.H)
    c0 = h0 if cell.has_c else None
    weights = Weights(x, x, None, None, None)  # which nobody looks at
    specs = TritonEngine(plan, precision).saved_specs(spec, LayerInputs(x, h0, c0, (weights,) * D))
    own = sum(torch.Size(s[0]).numel() * s[1].itemsize for s in specs if s is not None)
    states = (2 if cell.has_c else 1) * h0.nbytes
    return x.nbytes + case.T * case.B * D * case.H * size + states + own


def rows(case: Case, device: torch.device) -> Iterator[tuple[str, int]]:
    """Who saves how many bytes for a case."""
    plain = case.layer(device)
    x = case.input(device)
    layers: dict[str, nn.Module] = {"torch.nn": plain}
    for recompute in (False, True):
        name = "fused_rnn" + ", recompute" * recompute
        layers[name] = fused_rnn.fuse(case.layer(device), recompute=recompute)
    for name, layer in layers.items():
        yield f"{name} ({device.type})", saved_by(layer, lambda layer=layer: layer(x)[0])  # type: ignore[misc]
    if case.dtype != "fp64":
        for recompute in (False, True):
            yield "kernels" + ", recompute" * recompute, kernel_bytes(case, recompute)


def table(cases: list[Case], device: torch.device) -> str:
    """Bytes per step and sequence, in Markdown."""
    table_rows = [dict(rows(case, device)) for case in cases]
    names = list(dict.fromkeys(name for row in table_rows for name in row))
    lines = ["| cell | type | I, H | " + " | ".join(names) + " |", "|---" * (3 + len(names)) + "|"]
    for case, row in zip(cases, table_rows, strict=True):
        numbers = (f"{row[n] / (case.T * case.B):,.0f}" if n in row else "-" for n in names)
        text = f"| {case.cell} | {case.dtype} | {case.I}, {case.H} | " + " | ".join(numbers)
        lines.append(text + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--hidden", nargs="+", type=int, default=[256])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", type=device, default=default_device(), help="(%(default)s)")
    args = parser.parse_args(argv)
    cases = [
        Case(cell, dtype, args.steps, args.batch, H, H)
        for cell in args.cells
        for dtype in args.dtypes
        for H in args.hidden
    ]
    print(f"Bytes saved for backward per step and sequence; T = {args.steps}, B = {args.batch}\n")
    print(table(cases, args.device))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
