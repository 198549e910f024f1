"""Draw docs/regimes.svg: where the weights live and what moves in a time step, per regime.

    python docs/regimes.py

The sizes are those of the planner for an LSTM in bf16 with a batch of 8 on an H100.
"""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

from fused_rnn.cells.builtin import LSTM
from fused_rnn.kernels.chips import LIMITS
from fused_rnn.kernels.plan import Plan, PlanRequest
from fused_rnn.kernels.planner import make_plan

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "fused_rnn"  # the same file every time
REGISTERS, L2, MOVES, EDGE = "#cfe3f7", "#f3e3c3", "#b03a2e", "#333333"
TITLES = {
    "persistent": "persistent: one program per batch tile",
    "cooperative": "cooperative: a group shares the weights",
    "streamed": "streamed: the weights do not fit",
}


def box(ax: Axes, x: float, y: float, w: float, h: float, text: str, color: str) -> None:
    """A rectangle with text in its middle."""
    ax.add_patch(Rectangle((x, y), w, h, facecolor=color, edgecolor=EDGE, linewidth=1))
    ax.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=8)


def arrow(ax: Axes, a: tuple[float, float], b: tuple[float, float], **style: Any) -> None:
    """What moves once per step."""
    patch = FancyArrowPatch(a, b, arrowstyle="-|>", mutation_scale=10, color=MOVES, **style)
    ax.add_patch(patch)


def draw(ax: Axes, H: int, plan: Plan) -> None:
    """One regime: its programs above, L2 below."""
    ax.set(xlim=(0, 10), ylim=(0, 6.4))
    ax.axis("off")
    ax.set_title(f"{TITLES[plan.regime]}\nLSTM, H = {H}", fontsize=10)
    weights, exchange = 8 * H * H / 2**20, 2 * H * plan.block_b / 1024
    if plan.programs == 1:
        text = (
            f"program\n\nregisters: all weights\n{weights * 1024:.0f} KiB\n\nh, c, gates of a step"
        )
        box(ax, 3, 2.4, 4, 3.2, text, REGISTERS)
        box(ax, 1, 0.2, 8, 1, "memory", L2)
        arrow(ax, (4.2, 1.2), (4.2, 2.4))
        arrow(ax, (5.8, 2.4), (5.8, 1.2))
        ax.text(4.0, 1.75, "gates", ha="right", fontsize=8, color=MOVES)
        ax.text(6.0, 1.75, "h, saved gates", fontsize=8, color=MOVES)
        return
    held = plan.regime == "cooperative"
    mine = weights * 1024 / plan.programs
    for i, x in enumerate((0.4, 3.0, 7.2)):
        name = ("1", "2", str(plan.programs))[i]
        text = f"program {name}\n{plan.block_h} units\n\n"
        text += f"weights\n{mine:.0f} KiB" if held else "no weights\nkept"
        box(ax, x, 2.4, 2.3, 3.2, text, REGISTERS)
        if not held:
            arrow(ax, (x + 0.5, 1.2), (x + 0.5, 2.4), linewidth=3.5)
        arrow(ax, (x + 1.1, 1.2), (x + 1.1, 2.4))
        arrow(ax, (x + 1.8, 2.4), (x + 1.8, 1.2))
    ax.text(6.25, 4, "...", ha="center", va="center", fontsize=12)
    stored = f"L2: h of this step, {exchange:.0f} KiB"
    behind = f"{stored}; through it, all weights, {weights:.0f} MiB"
    box(ax, 0.4, 0.2, 9.1, 1, stored if held else behind, L2)
    ax.text(6.25, 1.75, "h" if held else "weights, h", ha="center", fontsize=8, color=MOVES)


def main() -> None:
    """Write the picture beside this file."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.9), layout="constrained")
    cell = LSTM.kernels
    assert cell is not None
    for ax, H in zip(axes, (128, 1024, 4096), strict=True):
        draw(ax, H, make_plan(PlanRequest(cell, H, torch.bfloat16, 8, 1), LIMITS[90]))
    figure.suptitle("Red: what moves in every step of the forward sweep", color=MOVES, fontsize=9)
    figure.savefig(Path(__file__).with_name("regimes.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
