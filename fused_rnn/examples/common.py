"""What the commands share: the choice of cell, and types of arguments that refuse bad values."""

import argparse
import math
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from fused_rnn import FusedGRU, FusedLSTM, FusedRNN

State = Tensor | tuple[Tensor, Tensor]
CELLS: dict[str, Callable[..., nn.Module]] = {"lstm": FusedLSTM, "gru": FusedGRU, "rnn": FusedRNN}


def detach(state: State) -> State:
    """The same state without its history, so that back-propagation stops here."""
    if isinstance(state, tuple):
        return state[0].detach(), state[1].detach()
    return state.detach()


def integer(at_least: int) -> Callable[[str], int]:
    """A command-line type: an integer no smaller than `at_least`."""

    def parse(text: str) -> int:
        value = int(text)
        if value < at_least:
            raise argparse.ArgumentTypeError(f"must be at least {at_least}, got {value}")
        return value

    parse.__name__ = "integer"  # argparse names it when int() fails
    return parse


def number(at_least: float, below: float = math.inf) -> Callable[[str], float]:
    """A command-line type: a finite number in [at_least, below)."""

    def parse(text: str) -> float:
        value = float(text)
        if not at_least <= value < below:  # also refuses nan
            raise argparse.ArgumentTypeError(f"must be in [{at_least}, {below}), got {text}")
        return value

    parse.__name__ = "number"
    return parse


def device(text: str) -> torch.device:
    """A command-line type: a device that this machine has and that can compute."""
    try:
        chosen = torch.device(text)
        torch.zeros((), device=chosen).item()  # "meta" allocates, but has no values
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises the latter
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {error}") from error
    return chosen


def default_device() -> str:
    """The GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def require(*modules: str) -> None:
    """End the process with one line unless optional packages can be imported.

    Args:
        *modules: names of modules that the extra "examples" installs.

    Raises:
        SystemExit: some are missing; the message names them and says what to install.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise SystemExit(f"not installed: {', '.join(missing)} (pip install 'fused-rnn[examples]')")
