"""Trains a small language model on a text, says how well it predicts, and lets it write.

    python -m fused_rnn.examples.textgen
    python -m fused_rnn.examples.textgen --corpus book.txt --cell lstm --minutes 10
    python -m fused_rnn.examples.textgen --load runs/textgen/model.pt --prompt "The for statement"

The yardstick is bits per character on text the model has not seen: what it would cost to transmit
that text with the model as the code. A compressor that has seen the same training text competes.
"""

import argparse
import json
import math
import pickle
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from fused_rnn.examples.common import (
    CELLS,
    State,
    default_device,
    detach,
    device,
    integer,
    number,
)
from fused_rnn.examples.corpus import (
    chunks,
    compressed_sizes,
    fingerprint,
    load_text,
    split,
    streams,
    unigram_entropy,
)
from fused_rnn.examples.tokenizer import LEVELS, UNKNOWN, Tokenizer

LOG_EVERY = 10  # steps between readings of the loss, each of which waits for the device
EVALUATIONS = 6  # points of the held-out curve


@dataclass(frozen=True)
class Config:
    """The shape of a model; with the vocabulary and the weights, all that a checkpoint holds."""

    level: str = "char"
    cell: str = "gru"
    hidden: int = 256
    layers: int = 1
    embedding: int = 128
    dropout: float = 0.0


@dataclass(frozen=True)
class Budget:
    """How long to train: a number of steps, or else of seconds."""

    steps: int | None = None
    seconds: float = math.inf

    def spent(self, steps: int, seconds: float) -> float:
        """The part of the budget that is used up; 1 and more mean to stop."""
        done, whole = (seconds, self.seconds) if self.steps is None else (steps, self.steps)
        return done / whole if whole else 1.0


@dataclass
class History:
    """What training leaves behind. Losses are (step, bits per token)."""

    train: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


class LanguageModel(nn.Module):
    """Embedding, recurrent layers, and a score for every token that may come next."""

    def __init__(self, config: Config, vocabulary: int) -> None:
        super().__init__()
        # An unknown word can be read (as nothing: its embedding stays zero), never written.
        self.embed = nn.Embedding(vocabulary, config.embedding, padding_idx=UNKNOWN)
        self.rnn = CELLS[config.cell](
            config.embedding,
            config.hidden,
            config.layers,
            dropout=config.dropout if config.layers > 1 else 0.0,
        )
        self.dropout = nn.Dropout(config.dropout)
        self.score = nn.Linear(config.hidden, vocabulary)

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Reads tokens (T, B); returns logits (T, B, vocabulary) and the state to go on from."""
        outputs, state = self.rnn(self.dropout(self.embed(tokens)), state)
        return self.score(self.dropout(outputs)), state


def token_loss(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats over the known targets."""
    flat = logits.flatten(0, -2), targets.flatten()
    return F.cross_entropy(*flat, ignore_index=UNKNOWN, reduction=reduction)


@torch.no_grad()
def evaluate(model: LanguageModel, ids: Tensor, chunk: int, batch: int = 1) -> float:
    """Bits per known token over a text read in order, the state carried from end to end.

    More than one stream is faster but starts as many times from a blank state.
    """
    training = model.training
    model.eval()
    state, bits, known = None, 0.0, 0
    for inputs, targets in chunks(*streams(ids, batch), chunk):
        logits, state = model(inputs, state)
        bits += token_loss(logits, targets, reduction="sum").item() / math.log(2)
        known += int((targets != UNKNOWN).sum())
    model.train(training)
    return bits / known if known else math.nan


def batches(ids: Tensor, batch: int, chunk: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Endless training chunks, and whether the state starts anew: once per pass over the text."""
    while True:
        # Turned by another offset each time, lest the same chunks with the same borders come again.
        turned = ids.roll(-int(torch.randint(chunk, ())))
        for i, (inputs, targets) in enumerate(chunks(*streams(turned, batch), chunk)):
            yield inputs, targets, i == 0


def train(
    model: LanguageModel,
    ids: Tensor,
    held_out: Tensor,
    budget: Budget,
    *,
    batch: int = 16,
    chunk: int = 64,
    lr: float = 4e-3,
) -> History:
    """Truncated back-propagation through time.

    Each step reads the next `chunk` tokens of every stream, goes on from the state in which the
    chunk before left the layer, and sends gradients back to the chunk's first token only.
    """
    history = History()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    data = batches(ids, batch, chunk)
    evaluation_batch = min(32, len(held_out) - 1)
    state: State | None = None
    recent: list[Tensor] = []
    spent = 0.0
    start = time.perf_counter()
    model.train()
    form = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
    with tqdm(total=1.0, bar_format=form, mininterval=0.5) as bar:
        while spent < 1:
            inputs, targets, fresh = next(data)
            logits, state = model(inputs, None if fresh or state is None else detach(state))
            loss = token_loss(logits, targets)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * spent))
            optimizer.step()

            history.steps += 1
            history.tokens += inputs.numel()
            recent.append(loss.detach())
            before, spent = spent, budget.spent(history.steps, time.perf_counter() - start)
            if len(recent) == LOG_EVERY or spent >= 1:
                bits = torch.stack(recent).mean().item() / math.log(2)
                if not math.isfinite(bits):
                    raise FloatingPointError(f"the loss is {bits} at step {history.steps}")
                history.train.append((history.steps, bits))
                recent.clear()
                bar.set_postfix_str(f"step {history.steps}, {bits:.3f} bits/token", refresh=False)
            if int(spent * EVALUATIONS) > int(before * EVALUATIONS):
                bits = evaluate(model, held_out, chunk, evaluation_batch)
                history.held_out.append((history.steps, bits))
            bar.update(min(spent, 1.0) - bar.n)
    history.seconds = time.perf_counter() - start
    return history


def probabilities(logits: Tensor, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
    """The distribution to draw the next token from.

    Args:
        logits: scores of shape (vocabulary,).
        temperature: below 1 the likely become likelier; 0 leaves only the likeliest.
        top_k: how many of the likeliest tokens to keep; all by default.
    """
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be finite and not negative, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if temperature == 0:
        return F.one_hot(logits.argmax(), len(logits)).to(logits.dtype)
    if top_k is not None and top_k < len(logits):
        kept = logits.topk(top_k)
        logits = torch.full_like(logits, -math.inf).scatter(0, kept.indices, kept.values)
    # Against the maximum, so that a tiny temperature cannot overflow.
    return ((logits - logits.max()) / temperature).softmax(0)


class Writer:
    """Reads a prompt, then proposes or writes what follows, one token at a time.

    Args:
        model: a trained model; it is switched to evaluation mode.
        tokenizer: the one it was trained with.
        prompt: text to begin with, put on a line of its own.

    Raises:
        ValueError: the prompt is empty or has tokens that the model has never seen.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, prompt: str = "") -> None:
        check_prompt(tokenizer, prompt)
        # A line break before it says that something begins here.
        ids = tokenizer.encode(prompt if tokenizer.unknown("\n") else "\n" + prompt)
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.device = model.score.weight.device
        self.ids = tokenizer.encode(prompt).tolist()
        self.state: State | None = None
        self.logits = self._read(ids.tolist())

    @torch.no_grad()
    def _read(self, ids: list[int]) -> Tensor:
        tokens = torch.tensor(ids, device=self.device).unsqueeze(1)
        logits, self.state = self.model(tokens, self.state)
        last: Tensor = logits[-1, 0].float().cpu()
        last[UNKNOWN] = -math.inf
        return last

    def predict(self, count: int) -> list[tuple[str, float]]:
        """The `count` likeliest next tokens and their probabilities, the likeliest first."""
        top = probabilities(self.logits).topk(min(count, len(self.logits) - 1))
        tokens = (self.tokenizer.vocabulary[i] for i in top.indices.tolist())
        return list(zip(tokens, top.values.tolist(), strict=True))

    def write(
        self,
        length: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> str:
        """Draws `length` tokens; returns everything from the prompt on."""
        for _ in range(length):
            chances = probabilities(self.logits, temperature, top_k)
            self.ids.append(int(chances.multinomial(1, generator=generator)))
            self.logits = self._read(self.ids[-1:])
        return self.tokenizer.decode(self.ids)


def check_prompt(tokenizer: Tokenizer, prompt: str) -> None:
    """Raises ValueError for a prompt that the model could not read."""
    if unknown := tokenizer.unknown(prompt):
        raise ValueError(f"not in the vocabulary: {', '.join(map(repr, unknown))}")
    if not tokenizer.split(prompt) and tokenizer.unknown("\n"):
        raise ValueError("an empty prompt: this model knows no line break to begin after")


def save(path: Path, model: LanguageModel, tokenizer: Tokenizer, config: Config) -> None:
    """Writes a checkpoint of plain data: numbers, strings and tensors."""
    checkpoint = {
        "config": asdict(config),
        "vocabulary": tokenizer.vocabulary,
        "weights": model.state_dict(),
    }
    torch.save(checkpoint, path)


def load(path: Path) -> tuple[LanguageModel, Tokenizer, Config]:
    """Reads a checkpoint back. Nothing in it can run code."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        config = Config(**checkpoint["config"])
        tokenizer = Tokenizer(config.level, checkpoint["vocabulary"])
        model = LanguageModel(config, len(tokenizer))
        model.load_state_dict(checkpoint["weights"])
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} is not a checkpoint of this example: {error}") from error
    return model, tokenizer, config


def plot(history: History, lines: dict[str, float], unit: str, path: Path) -> None:
    """Draws the learning curve, and what it has to beat as horizontal lines."""
    from matplotlib.figure import Figure  # without pyplot no display is needed

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*history.train, strict=True), lw=1, alpha=0.7, label="training")
    axes.plot(*zip(*history.held_out, strict=True), "o-", label="held-out")
    for i, (name, bits) in enumerate(lines.items()):
        axes.axhline(bits, ls="--", lw=1, color=f"C{i + 2}", label=f"{name} {bits:.2f}")
    axes.set(xlabel="training step", ylabel=f"bits per {unit}", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=150)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fused_rnn.examples.textgen",
        description="Train a language model on a text, test it on the last tenth, let it write.",
    )
    new = Config()
    shape = parser.add_argument_group("model (of a new one; --load brings its own)")
    # SUPPRESS: what is not given is absent, so that the defaults stand in Config alone.
    for name, kind, choices, text in (
        ("level", str, LEVELS, "what a token is"),
        ("cell", str, tuple(CELLS), "kind of recurrent layer"),
        ("hidden", integer(1), None, "units per layer"),
        ("layers", integer(1), None, "recurrent layers"),
        ("embedding", integer(1), None, "numbers that a token is looked up as"),
        ("dropout", number(0, below=1), None, "part of the activations to drop in training"),
    ):
        shape.add_argument(
            f"--{name}",
            type=kind,
            choices=choices,
            default=argparse.SUPPRESS,
            help=f"{text} (default: {getattr(new, name)})",
        )

    training = parser.add_argument_group("training")
    training.add_argument(
        "--corpus", type=Path, metavar="FILE", help="UTF-8 text (default: Python's own reference)"
    )
    budget = training.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=integer(0), help="train for so many steps")
    budget.add_argument(
        "--minutes", type=number(0), help="train for so long (default: 2, or 0 with --load)"
    )
    training.add_argument(
        "--batch", type=integer(1), default=16, help="streams read side by side (%(default)s)"
    )
    training.add_argument(
        "--chunk", type=integer(1), default=64, help="tokens between updates (%(default)s)"
    )
    training.add_argument("--lr", type=number(0), default=4e-3, help="learning rate (%(default)s)")

    writing = parser.add_argument_group("writing")
    writing.add_argument("--prompt", default="", help="how the text begins (default: a new line)")
    writing.add_argument(
        "--length", type=integer(0), default=400, help="tokens to write (%(default)s)"
    )
    writing.add_argument(
        "--temperature", type=number(0), default=0.8, help="0 takes the likeliest (%(default)s)"
    )
    writing.add_argument(
        "--top-k", type=integer(1), help="choose among the K likeliest (default: all)"
    )
    writing.add_argument(
        "--predict",
        metavar="PROMPT",
        help="instead of writing, list the K likeliest next tokens (default: 5)",
    )

    parser.add_argument("--seed", type=int, default=0, help="of all random numbers (%(default)s)")
    parser.add_argument("--threads", type=integer(1), help="CPU threads (default: torch's choice)")
    parser.add_argument("--device", type=device, default=default_device(), help="(%(default)s)")
    parser.add_argument("--load", type=Path, metavar="CHECKPOINT", help="start from this model")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/textgen"), help="folder for results (%(default)s)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the example."""
    parser = build_parser()
    args = parser.parse_args(argv)
    shape = {f.name: getattr(args, f.name) for f in fields(Config) if f.name in args}
    if args.load and shape:
        parser.error(f"--load brings its own model: drop --{', --'.join(shape)}")
    if args.steps is None and args.minutes is None:
        budget = Budget(steps=0) if args.load else Budget(seconds=120)
    else:
        budget = Budget(args.steps, 60 * (args.minutes or 0))
    training = budget.spent(0, 0) < 1
    if not (training or args.load):
        parser.error("nothing to train and no model to --load")

    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:  # whatever can be wrong with the input shows here, before the first step
        text = load_text(args.corpus) if training else ""
        learned, held_out = split(text)
        if args.load:
            model, tokenizer, config = load(args.load)
        else:
            config = Config(**shape)
            # Characters of the held-out text count as known: they have to be paid for, too.
            tokenizer = Tokenizer.from_text(
                config.level, text if config.level == "char" else learned
            )
            model = LanguageModel(config, len(tokenizer))
        if training:
            check_corpus(tokenizer, learned, held_out)
        check_prompt(tokenizer, args.predict if args.predict is not None else args.prompt)
        if training:
            args.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        parser.error(str(error))

    model.to(args.device)
    if training:
        report = learn(model, tokenizer, config, learned, held_out, budget, args)
        (args.out / "metrics.json").write_text(json.dumps(report, indent=2) + "\n")
        save(args.out / "model.pt", model, tokenizer, config)
        print(f"wrote {args.out}/model.pt, metrics.json and curve.png")

    if args.predict is not None:
        print(f"after {args.predict!r}:")
        for token, chance in Writer(model, tokenizer, args.predict).predict(args.top_k or 5):
            print(f"  {chance:6.1%}  {token!r}")
    elif args.length:
        generator = torch.Generator().manual_seed(args.seed)
        writer = Writer(model, tokenizer, args.prompt)
        print(writer.write(args.length, args.temperature, args.top_k, generator))
    return 0


def check_corpus(tokenizer: Tokenizer, learned: str, held_out: str) -> None:
    """Raises ValueError for a text that cannot be trained or tested on."""
    for name, part in (("to train on", learned), ("held out", held_out)):
        if len(tokenizer.split(part)) < 2:
            raise ValueError(f"the corpus is too short: fewer than 2 tokens {name}")
    if set(tokenizer.split(held_out)) <= set(tokenizer.unknown(held_out)):
        raise ValueError("none of the held-out text is in the vocabulary")
    if tokenizer.level == "char" and (unknown := tokenizer.unknown(learned + held_out)):
        raise ValueError(f"the loaded model does not know {', '.join(map(repr, unknown))}")


def learn(
    model: LanguageModel,
    tokenizer: Tokenizer,
    config: Config,
    learned: str,
    held_out: str,
    budget: Budget,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Trains, tests, prints and plots; returns the results."""
    text = learned + held_out
    ids = tokenizer.encode(learned).to(args.device)
    held_ids = tokenizer.encode(held_out).to(args.device)
    # A short text fills fewer streams; each should last for a chunk at least.
    batch = min(args.batch, max(1, (len(ids) - 1) // args.chunk))
    parameters = sum(p.numel() for p in model.parameters())
    name = str(args.corpus or "pydoc_data.topics")
    print(f"text: {name}, {len(text):,} characters, sha256 {fingerprint(text)}, 10% held out")
    print(f"model: {parameters:,} parameters, {len(tokenizer):,} tokens, {config}")
    print(f"training: {batch} streams, {args.chunk} tokens per chunk, on {args.device}", flush=True)

    history = train(model, ids, held_ids, budget, batch=batch, chunk=args.chunk, lr=args.lr)
    bits = evaluate(model, held_ids, chunk=1024)
    report: dict[str, Any] = {
        "corpus": {"name": name, "characters": len(text), "sha256": fingerprint(text)},
        "config": asdict(config),
        "training": {
            "batch": batch,
            "chunk": args.chunk,
            "lr": args.lr,
            "seed": args.seed,
            "steps": history.steps,
            "tokens": history.tokens,
            "seconds": history.seconds,
            "parameters": parameters,
            "device": str(args.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "curve": {"train": history.train, "held_out": history.held_out},
    }
    lines: dict[str, float] = {}
    rate = history.tokens / history.seconds
    print(f"{history.steps:,} steps in {history.seconds:.0f} s, {rate:,.0f} tokens/s")
    if config.level == "char":
        lines = {"unigram": unigram_entropy(held_out), **compressed_sizes(learned, held_out)}
        report["bits_per_character"] = {"model": bits, **lines}
        print("held-out text, bits per character (compressors know the training text):")
        for who, value in report["bits_per_character"].items():
            print(f"  {who:8} {value:.3f}")
    else:
        unknown = (held_ids == UNKNOWN).float().mean().item()
        report |= {"perplexity": 2**bits, "out_of_vocabulary": unknown}
        print(f"held-out text: perplexity {2**bits:.1f} per known word, {unknown:.1%} unknown")
    plot(history, lines, "character" if config.level == "char" else "word", args.out / "curve.png")
    return report


if __name__ == "__main__":
    raise SystemExit(main())
