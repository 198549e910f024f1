"""Layers as the arguments of an operator, and back."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor

from fused_rnn.engines import reference
from fused_rnn.engines.dispatch import Backend, choose
from fused_rnn.spec.batch import BatchLayout
from fused_rnn.spec.cells import Cell, cell_of
from fused_rnn.spec.layer import Engine, LayerInputs, LayerSpec, Options, Outputs


class Settings(NamedTuple):
    """What the operators are told of a layer beside tensors and numbers.

    They take it as one string, ``lstm directions=1 recompute=0 backend=auto cells=0
    present=11...``, which an exported graph can hold and a reader can read.

    Attributes:
        key: of the cell.
        directions: 1 or 2.
        recompute: whether only the states are saved for backward.
        backend: what the user asks for: "auto", "triton", "cpu", "native" or "eager".
        cells: whether c of all steps is an output.
        present: which of :meth:`fused_rnn.spec.layer.LayerInputs.flatten` there are.
    """

    key: str
    directions: int
    recompute: bool
    backend: Backend
    cells: bool
    present: tuple[bool, ...]

    @property
    def cell(self) -> Cell:
        """The cell, which has been defined in this process.

        Raises:
            RuntimeError: it has not.
        """
        return cell_of(self.key)

    @staticmethod
    def text(spec: LayerSpec, inputs: LayerInputs, backend: Backend) -> str:
        """As the operators take it; by means that Dynamo can follow."""
        cells = spec.options is not None and spec.options.cells
        present = "".join(["0" if t is None else "1" for t in inputs.flatten()])
        return (
            f"{spec.cell.key} directions={spec.directions} recompute={int(spec.recompute)} "
            f"backend={backend} cells={int(cells)} present={present}"
        )

    @staticmethod
    @lru_cache(maxsize=4096)
    def of(text: str) -> "Settings":
        """From the text."""
        key, *pairs = text.split()
        directions, recompute, backend, cells, present = (p.partition("=")[2] for p in pairs)
        marks = tuple([mark == "1" for mark in present])
        known: Any = backend
        return Settings(key, int(directions), recompute == "1", known, cells == "1", marks)

    @staticmethod
    @lru_cache(maxsize=4096)
    def each(text: str) -> "tuple[Settings, ...]":
        """Those of all layers of a stack, from their texts with "; " between them."""
        return tuple([Settings.of(one) for one in text.split("; ")])

    def restore(self, tensors: Sequence[Any]) -> LayerInputs:
        """The inputs, of those tensors that there are."""
        left = iter(tensors)
        return LayerInputs.restore([next(left) if there else None for there in self.present])


class Call(NamedTuple):
    """The arguments of either operator, sorted out.

    Attributes:
        spec: the layer; while it is traced, its layout says no more than whether lengths differ.
        inputs: its tensors, with rows [N, .].
        engine: what runs where backward is to follow.
        run: what runs where it is not, in place of the engine's forward; or None.
    """

    spec: LayerSpec
    inputs: LayerInputs
    engine: Engine
    run: Callable[[LayerSpec, LayerInputs], Outputs] | None


def sorted_out(
    tensors: Sequence[Tensor],
    batch_sizes: Tensor | None,
    told: Settings,
    numbers: Sequence[float],
    *,
    traced: bool = False,
    record: bool = True,
) -> Call:
    """Sort the arguments of an operator out; ``traced`` sizes are not looked at.

    Raises:
        RuntimeError: ``batch_sizes`` do not fit the tensors, or the backend cannot run the layer.
    """
    _, directions, recompute, backend, cells, _ = told
    cell = told.cell
    inputs = told.restore(tensors)
    x, h0, _, weights, given = inputs
    zoneout, clip = numbers[0], numbers[1] if len(numbers) > 1 else None
    options = Options(zoneout > 0 or given.zone_h is not None, zoneout, clip, cells)
    if traced:  # whether there is an engine does not depend on T and B
        layout = BatchLayout(1, 1, None if batch_sizes is None else (1,))
    elif batch_sizes is None:
        layout = BatchLayout(x.shape[0], x.shape[1])
    else:
        layout = BatchLayout.packed(batch_sizes)
        if (x.shape[0], h0.shape[1]) != (layout.N, layout.B):
            raise RuntimeError(
                f"batch_sizes stand for {layout.N} rows of {layout.B} sequences, but got "
                f"{x.shape[0]} rows and initial states of {h0.shape[1]} sequences"
            )
    if batch_sizes is None:
        inputs = _as_rows(inputs)
    plain = options == Options() and all([t is None for t in given])
    spec = LayerSpec(
        cell,
        layout,
        directions,
        weights[0].w_ih.shape[0] // cell.blocks,
        projected=weights[0].w_hr is not None,
        recompute=recompute,
        options=None if plain else options,
        heads=1 if weights[0].w_hh.dim() == 2 else weights[0].w_hh.shape[0],
    )
    choice = choose(spec, x.device, x.dtype, backend, record)
    run = None if record else choice.run
    return Call(spec, inputs, choice.engine or reference, run)


def by_layer(flat: Sequence[Any], settings: Sequence[Settings], x: Any) -> list[list[Any]]:
    """What ``flat`` has of each layer; ``x`` in the place of the input of all but the first."""
    left, parts = iter(flat), []
    for number, told in enumerate(settings):
        above = [x] if number > 0 else []
        parts.append(above + list(islice(left, sum(told.present) - len(above))))
    return parts


def _as_rows(inputs: LayerInputs) -> LayerInputs:
    """Tensors with [T, B] steps as such with N rows."""
    options = inputs.options
    reset = None if options.reset is None else options.reset.flatten()
    zone_h, zone_c = rows_of(options.zone_h), rows_of(options.zone_c)
    options = options._replace(reset=reset, zone_h=zone_h, zone_c=zone_c)
    return inputs._replace(x=inputs.x.reshape(-1, inputs.x.shape[-1]), options=options)


def rows_of(tensor: Tensor | None) -> Tensor | None:
    """[..., K] as [N, K]."""
    return None if tensor is None else tensor.reshape(-1, tensor.shape[-1])


def present(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """Those that there are."""
    return [t for t in tensors if t is not None]
