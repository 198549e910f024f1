"""A small language model: how it is trained, tested and kept, and how it writes."""

import math
import pickle
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_rnn.examples.common import CELLS, State, detach
from fused_rnn.examples.corpus import chunks, streams
from fused_rnn.examples.tokenizer import UNKNOWN, Tokenizer

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
    from tqdm import tqdm  # an optional package, so only where it is wanted

    history = History()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    data = batches(ids, batch, chunk)
    evaluation_batch = min(32, len(held_out) - 1)
    state: State | None = None
    recent: list[Tensor] = []
    spent = 0.0
    start = time.perf_counter()
    model.train()
    form = "{l_bar}{bar}| {elapsed}, {remaining} left{postfix}"
    # Without smoothing, the time left follows from the mean step so far: evaluations are no jolts.
    with tqdm(total=1.0, bar_format=form, mininterval=0.5, smoothing=0) as bar:
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
