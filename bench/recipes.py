"""The recipes of docs/recipes.md beside what each replaces: the same numbers, and both times.

    python -m bench.recipes                            all of them, on a GPU if there is one
    python -m bench.recipes --only resets --seconds 5

Two functions stand for each recipe, on layers with the same parameters. Their results, gradients
included, are compared first; a difference ends the run. Then they take turns.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fused_rnn
from bench import timing
from fused_rnn.examples.common import default_device, device

Results = list[Tensor]


@dataclass(frozen=True)
class Recipe:
    """A recipe.

    Attributes:
        title: what the table calls it.
        usual: the usual way, by torch.nn's layers; returns what is compared.
        ours: the same by a fused layer.
    """

    title: str
    usual: Callable[[], Results]
    ours: Callable[[], Results]


def _twins(kind: Callable[..., Any], I: int, H: int, device: torch.device) -> tuple[Any, Any]:
    torch.manual_seed(0)
    plain = kind(I, H, device=device)
    fused = fused_rnn.fuse(kind(I, H, device=device))
    fused.load_state_dict(plain.state_dict())
    return plain, fused


def _gradients(layer: nn.Module, output: Tensor) -> Results:
    return [output, *torch.autograd.grad(output.square().mean(), list(layer.parameters()))]


def resets(device: torch.device, T: int = 128, B: int = 16, I: int = 64, H: int = 128) -> Recipe:
    """Training on a rollout whose episodes end anywhere: a step at a time, or in one sweep."""
    plain, fused = _twins(nn.LSTM, I, H, device)
    x, start = torch.randn(T, B, I, device=device), torch.rand(T, B, device=device) < 0.02

    def usual() -> Results:
        state = (x.new_zeros(1, B, H), x.new_zeros(1, B, H))
        outputs = []
        for x_t, start_t in zip(x, start, strict=True):
            keep = (~start_t).to(x.dtype).view(1, B, 1)
            output, state = plain(x_t[None], (keep * state[0], keep * state[1]))
            outputs.append(output)
        return _gradients(plain, torch.cat(outputs))

    def ours() -> Results:
        return _gradients(fused, fused(x, reset=start)[0])

    return Recipe(f"LSTM on a rollout, T, B, H = {T}, {B}, {H}: steps with masks", usual, ours)


def lengths(device: torch.device, T: int = 128, B: int = 32, I: int = 64, H: int = 128) -> Recipe:
    """Training on sequences of unequal length: packed, or by their lengths."""
    plain, fused = _twins(nn.GRU, I, H, device)
    x, n = torch.randn(T, B, I, device=device), torch.randint(1, T + 1, (B,), device=device)
    n[0] = T

    def usual() -> Results:
        packed = pack_padded_sequence(x, n.cpu(), enforce_sorted=False)
        return _gradients(plain, pad_packed_sequence(plain(packed)[0])[0])

    def ours() -> Results:
        return _gradients(fused, fused(x, lengths=n)[0])

    return Recipe(f"GRU, unequal lengths, T, B, H = {T}, {B}, {H}: sort, pack, pad", usual, ours)


def streaming(device: torch.device, T: int = 256, B: int = 1, I: int = 64, H: int = 128) -> Recipe:
    """Inference on what comes in step by step, the state carried."""
    plain, fused = _twins(nn.GRU, I, H, device)
    x = torch.randn(T, B, I, device=device)

    def steps(layer: nn.Module) -> Results:
        state, outputs = None, []
        with torch.inference_mode():
            for x_t in x.split(1):
                output, state = layer(x_t, state)
                outputs.append(output)
        return [torch.cat(outputs)]

    title = f"GRU, one step at a time, B, H = {B}, {H}: nn.GRU"
    return Recipe(title, lambda: steps(plain), lambda: steps(fused))


def truncated(device: torch.device, T: int = 512, B: int = 16, I: int = 64, H: int = 128) -> Recipe:
    """Training on blocks of a long sequence, the state carried and cut off between them."""
    plain, fused = _twins(nn.GRU, I, H, device)
    x = torch.randn(T, B, I, device=device)

    def blocks(layer: nn.Module) -> Results:
        state, grads = None, []
        for block in x.split(64):
            output, state = layer(block, state)
            grads += _gradients(layer, output)
            state = state.detach()
        return grads

    title = f"GRU, truncated BPTT, 64 of T, B, H = {T}, {B}, {H}: nn.GRU"
    return Recipe(title, lambda: blocks(plain), lambda: blocks(fused))


RECIPES: dict[str, Callable[[torch.device], Recipe]] = {
    "resets": resets,
    "lengths": lengths,
    "streaming": streaming,
    "truncated": truncated,
}


def check(recipe: Recipe) -> None:
    """Raise AssertionError unless both ways have the same results, to fp32's rounding."""
    for ours, expected in zip(recipe.ours(), recipe.usual(), strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5 * max(scale, 1e-3))


def rows(names: list[str], where: torch.device, seconds: float) -> Iterator[str]:
    """The rows of the table."""
    once = timing.timer(where)[1]
    for name in names:
        recipe = RECIPES[name](where)
        check(recipe)
        times = timing.interleaved({"usual": recipe.usual, "ours": recipe.ours}, seconds, once)
        usual, ours = times["usual"].median, times["ours"].median
        yield f"| {recipe.title} | {usual:.2f} | {ours:.2f} | {times['ours'].ratio:.2f} |"


def main(arguments: list[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        "python -m bench.recipes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = list(RECIPES)
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each (2)")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU (1)")
    parser.add_argument("--device", type=device, default=default_device(), help="cpu or cuda")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print("| recipe: what it replaces | that, ms | fused_rnn, ms | ratio |")
    print("|---|---|---|---|")
    for row in rows(options.only, options.device, options.seconds):
        print(row, flush=True)


if __name__ == "__main__":
    main()
