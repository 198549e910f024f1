"""Trains a small language model on a text, says how well it predicts, and lets it write.

    python -m fused_rnn.examples.textgen
    python -m fused_rnn.examples.textgen --corpus book.txt --cell lstm --minutes 10
    python -m fused_rnn.examples.textgen --load runs/textgen/model.pt --prompt "The for statement"

The yardstick is bits per character on text the model has not seen: what it would cost to transmit
that text with the model as the code. A compressor that has seen the same training text competes.

The number of training steps is fixed by default, so that a busy machine takes longer but learns the
same. The same seed gives the same model on the same machine; another CPU, number of threads or
version of PyTorch rounds in other places, which can move the third digit. The default text comes
with Python and differs a little from one version to the next.
"""

import argparse
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from fused_rnn.examples.common import CELLS, default_device, device, integer, number, require
from fused_rnn.examples.corpus import (
    compressed_sizes,
    fingerprint,
    load_text,
    split,
    unigram_entropy,
)
from fused_rnn.examples.language_model import (
    Budget,
    Config,
    History,
    LanguageModel,
    Writer,
    check_prompt,
    evaluate,
    load,
    save,
    train,
)
from fused_rnn.examples.tokenizer import LEVELS, UNKNOWN, Tokenizer

STEPS = 2000  # about two minutes on two CPU cores that have nothing else to do


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
    _add_model(parser)
    _add_training(parser)
    _add_writing(parser)
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers (%(default)s)")
    parser.add_argument("--threads", type=integer(1), help="CPU threads (default: torch's choice)")
    parser.add_argument("--device", type=device, default=default_device(), help="(%(default)s)")
    parser.add_argument("--load", type=Path, metavar="CHECKPOINT", help="start from this model")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/textgen"), help="folder for results (%(default)s)"
    )
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
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


def _add_training(parser: argparse.ArgumentParser) -> None:
    training = parser.add_argument_group("training")
    training.add_argument(
        "--corpus", type=Path, metavar="FILE", help="UTF-8 text (default: Python's own reference)"
    )
    budget = training.add_mutually_exclusive_group()
    budget.add_argument(
        "--steps",
        type=integer(0),
        help=f"train for so many steps (default: {STEPS}, or 0 with --load)",
    )
    budget.add_argument(
        "--minutes",
        type=number(0),
        help="train for so long instead: how much is learned then depends on the machine",
    )
    training.add_argument(
        "--batch", type=integer(1), default=16, help="streams read side by side (%(default)s)"
    )
    training.add_argument(
        "--chunk", type=integer(1), default=64, help="tokens between updates (%(default)s)"
    )
    training.add_argument("--lr", type=number(0), default=4e-3, help="learning rate (%(default)s)")


def _add_writing(parser: argparse.ArgumentParser) -> None:
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


def main(argv: list[str] | None = None) -> int:
    """Runs the example."""
    parser = build_parser()
    args = parser.parse_args(argv)
    shape = {f.name: getattr(args, f.name) for f in fields(Config) if f.name in args}
    if args.load and shape:
        parser.error(f"--load brings its own model: drop --{', --'.join(shape)}")
    if args.steps is None and args.minutes is None:
        budget = Budget(steps=0 if args.load else STEPS)
    else:
        budget = Budget(args.steps, 60 * (args.minutes or 0))
    training = budget.spent(0, 0) < 1
    if not (training or args.load):
        parser.error("nothing to train and no model to --load")
    if training:
        require("tqdm", "matplotlib")

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
        if worse := better_ones(bits, lines):
            print(f"the model is worse than {', '.join(worse)}: train for longer, or on more text")
    else:
        unknown = (held_ids == UNKNOWN).float().mean().item()
        report |= {"perplexity": 2**bits, "out_of_vocabulary": unknown}
        print(f"held-out text: perplexity {2**bits:.1f} per known word, {unknown:.1%} unknown")
    plot(history, lines, "character" if config.level == "char" else "word", args.out / "curve.png")
    return report


def better_ones(bits: float, lines: dict[str, float]) -> list[str]:
    """Who needs fewer bits per character than the model, where that should not be.

    That is whoever knows less than a trained model: the frequencies of characters alone, or with
    zlib what stood in the last 32 KiB. bz2 and lzma see much farther back.
    """
    return [name for name in ("unigram", "zlib") if lines[name] < bits]


if __name__ == "__main__":
    raise SystemExit(main())
