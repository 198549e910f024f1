"""A text to learn from, the streams it is read in, and what compressors make of it."""

import bz2
import hashlib
import lzma
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "zlib": lambda data: zlib.compress(data, 9),
    "bz2": lambda data: bz2.compress(data, 9),
    "lzma": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
}


def load_text(path: Path | None = None) -> str:
    """The text of a UTF-8 file; without one, the language reference that comes with Python.

    That reference, `pydoc_data.topics`, is what `help("while")` prints. It differs a little from
    one Python version to the next, so results should name its `fingerprint`.
    """
    if path is None:
        from pydoc_data.topics import topics  # half a megabyte, so only where it is wanted

        return "\n".join(topics.values())
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    if not text.strip():
        raise ValueError(f"{path} holds no text")
    return text


def fingerprint(text: str) -> str:
    """A short hash that tells one text from another."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def split(text: str, held_out: float = 0.1) -> tuple[str, str]:
    """Cuts a text in two: what to train on, and its last tenth, to test on."""
    cut = len(text) - round(len(text) * held_out)
    return text[:cut], text[cut:]


def streams(ids: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Lays a token sequence out as `batch` contiguous streams, side by side.

    Args:
        ids: the tokens, of shape (N,).
        batch: how many streams.

    Returns:
        inputs and targets, both of shape (T, batch): the target is the token after the input.
        The last (N - 1) % batch tokens find no place.
    """
    steps = (len(ids) - 1) // batch
    if steps < 1:
        raise ValueError(f"{len(ids)} tokens are too few for {batch} streams")
    used = steps * batch
    inputs, targets = ids[:used], ids[1 : used + 1]
    return inputs.view(batch, steps).t(), targets.view(batch, steps).t()


def chunks(inputs: Tensor, targets: Tensor, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cuts streams into successive pieces of `length` steps; the last may be shorter."""
    for start in range(0, len(inputs), length):
        yield inputs[start : start + length], targets[start : start + length]


def unigram_entropy(text: str) -> float:
    """Bits per character for a code that knows how frequent each character is, and no more."""
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values())


def compressed_sizes(train: str, held_out: str) -> dict[str, float]:
    """Bits per character that each compressor adds for `held_out`, given `train` before it."""
    before, both = train.encode(), (train + held_out).encode()
    return {
        name: 8 * (len(compress(both)) - len(compress(before))) / len(held_out)
        for name, compress in COMPRESSORS.items()
    }
