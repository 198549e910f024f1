"""Names and sizes of a layer's parameters, by torch.nn's rules."""

from typing import Any

from fused_rnn.spec.cells import Cell

Entry = tuple[str, tuple[int, ...]]  # the name of a parameter, and its size
# Those of :class:`fused_rnn.spec.layer.Weights` of one direction, the cell's own ones last.
Entries = list[Any]


def entries_of(
    cell: Cell, I: int, H: int, R: int, layers: int, directions: int, bias: bool, heads: int
) -> list[list[Entries]]:
    """By layer and direction, the entries of :class:`fused_rnn.spec.layer.Weights`.

    Args:
        cell: the cell.
        I: features of the input.
        H: hidden units.
        R: those of a projected h, or 0.
        layers: of the stack.
        directions: 1 or 2.
        bias: whether there are biases.
        heads: blocks of the recurrent weights.
    """
    rows, carried, width = cell.blocks * H, R or H, I
    recurrent = (rows, carried) if heads == 1 else (heads, rows // heads, H // heads)
    by_layer = []
    for layer in range(layers):
        mine = []
        for suffix in ("", "_reverse")[:directions]:
            sizes = (rows, width), recurrent, (rows,), (rows,), (carried, H)
            kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
            there = (True, True, bias, bias, R > 0)
            entries: Entries = [
                (f"{kind}_l{layer}{suffix}", size) if here else None
                for kind, size, here in zip(kinds, sizes, there, strict=True)
            ]
            vectors = [(f"{name}_l{layer}{suffix}", (H,)) for name in cell.parameters]
            mine.append([*entries, vectors])
        by_layer.append(mine)
        width = carried * directions
    return by_layer


def present(entries: Entries) -> list[Entry]:
    """Those that there are, in torch.nn's order."""
    *weights, vectors = entries
    return [*[e for e in weights if e is not None], *vectors]
