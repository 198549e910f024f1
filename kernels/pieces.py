"""How the layers of a stack overlap: time is cut into pieces, a launch each. Plain Python.

A layer can run a piece as soon as the layer below has run it, so that after the first pieces all
layers are at work at once, like a wavefront. Each is on a stream of its own; where not all find
room on the chip side by side, several share a stream and take turns.
"""

from functools import lru_cache
from typing import NamedTuple

from fused_rnn.kernels.chips import Limits
from fused_rnn.kernels.plan import Plan, PlanRequest

# Steps: a piece of a uniform batch then begins at 16 bytes in memory, whatever B and H are.
GRAIN = 16
MOST_PIECES = 64
# Measured on an H200 with CUDA graphs, an LSTM of four layers: what a piece costs beside its steps,
# which is a hop between streams, and the weights' way into registers.
PIECE_US = 25.0
FORWARD_SHARE = 0.35  # of a forward and a reverse step together
# Of the host, for each layer and for each of its pieces. Measured beside an H200, before a piece's
# launch took over what the first one had found: no more than that.
FORWARD_HOST_US, REVERSE_HOST_US = (420.0, 85.0), (300.0, 220.0)
WORTH = 0.9  # of the time that the layers take one after the other; else they run so


class Cut(NamedTuple):
    """How a sweep through a stack is cut.

    Attributes:
        pieces: how many; 1 for layers that run one after the other.
        steps: of each piece but the last, which may have less.
        streams: for as many layers at a time.
        reason: why so.
    """

    pieces: int
    steps: int
    streams: int
    reason: str


class Cuts(NamedTuple):
    """Those of both sweeps of a stack; without gradients there is no reverse one."""

    forward: Cut
    reverse: Cut | None

    @property
    def overlap(self) -> bool:
        """Whether layers run at the same time in any of them."""
        return any(cut is not None and cut.pieces > 1 for cut in self)

    def __str__(self) -> str:
        if not self.overlap:
            return self.forward.reason
        streams = max(cut.streams for cut in self if cut is not None)
        text = f"up to {streams} layers at a time: "
        if self.reverse is None:
            return text + self.forward.reason
        ways = [
            cut.reason if cut.pieces > 1 else "one by one" for cut in (self.forward, self.reverse)
        ]
        return f"{text}forward {ways[0]}, reverse {ways[1]}"


@lru_cache(maxsize=4096)
def cut_stack(
    request: PlanRequest,
    plan: Plan,
    layers: int,
    T: int,
    limits: Limits,
    *,
    train: bool = True,
    captured: bool = False,
) -> Cuts:
    """Cut the sweeps of a stack of equal layers.

    Args:
        request: one of its layers.
        plan: the layer's.
        layers: of the stack.
        T: time steps.
        limits: the chip.
        train: whether there is a reverse sweep.
        captured: whether a CUDA graph records it, so that the host's time does not count.
    """
    streams = min(layers, layers_at_a_time(request, plan, limits))

    def cut(share: float, host_us: tuple[float, float]) -> Cut:
        return _cut(layers, T, streams, share * plan.step_us, (0.0, 0.0) if captured else host_us)

    reverse = cut(1 - FORWARD_SHARE, REVERSE_HOST_US) if train else None
    return Cuts(cut(FORWARD_SHARE, FORWARD_HOST_US), reverse)


def layers_at_a_time(request: PlanRequest, plan: Plan, limits: Limits) -> int:
    """How many layers' launches are resident on the chip together, all programs of each.

    A group begins when all of it finds room, and its programs wait for each other alone. With room
    for all layers under way, none of them holds a place that another one waits for.
    """
    launches = list(plan.launches(request.B, request.D))
    if len(launches) > 1:  # it fills the chip by itself
        return 1
    _, tiles, _, directions = launches[0]
    programs = plan.programs * tiles * directions
    return limits.places(plan.warps, plan.shared) // programs


def stack_us(
    layers: int,
    T: int,
    pieces: int,
    streams: int,
    step_us: float,
    host_us: tuple[float, float] = (0.0, 0.0),
) -> float:
    """A model of the time of one sweep through a stack, in microseconds; no measurement.

    Args:
        layers: of the stack.
        T: time steps.
        pieces: of the time.
        streams: layers at a time.
        step_us: of one layer's step.
        host_us: of the host, for each layer and for each of its pieces.
    """
    if pieces == 1 or streams == 1:
        return layers * T * step_us
    rounds = -(-layers // streams) * pieces + min(layers, streams) - 1
    host = layers * (host_us[0] + pieces * host_us[1])
    return max(rounds * (T / pieces * step_us + PIECE_US), host)


def _cut(layers: int, T: int, streams: int, step_us: float, host_us: tuple[float, float]) -> Cut:
    if streams < 2:
        return Cut(1, T, 1, "one fills the chip")
    counts, most = [1], min(MOST_PIECES, T // GRAIN)
    while 2 * counts[-1] <= most:
        counts.append(2 * counts[-1])
    times = {n: stack_us(layers, T, n, streams, step_us, host_us) for n in counts}
    best = min(counts, key=lambda n: times[n])
    if times[best] > WORTH * times[1]:
        return Cut(1, T, 1, f"{T} steps are too few to cut")
    steps = -(-T // (best * GRAIN)) * GRAIN
    pieces = -(-T // steps)
    return Cut(pieces, steps, streams, f"in {pieces} pieces of {steps} steps")
