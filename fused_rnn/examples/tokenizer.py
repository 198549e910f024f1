"""Text to integers and back: one token per character, or per word, punctuation mark, line break."""

import re
from collections.abc import Iterable

import torch
from torch import Tensor

LEVELS = ("char", "word")
UNKNOWN = 0  # the id of every token outside the vocabulary

_WORDS = re.compile(r"\n|\w+(?:['\u2019]\w+)*|[^\w\s]")
_GLUED_LEFT = set(".,;:!?)]}…\n")  # no space before these
_GLUED_RIGHT = set("([{\n")  # nor after these


class Tokenizer:
    """Numbers the tokens of a text.

    Characters decode to the very same text. Words are lower-cased and forget how wide the spaces
    were: what survives decoding is the sequence of tokens.

    Args:
        level: "char" or "word".
        vocabulary: the tokens in the order of their ids; the first stands for all unknown ones.
    """

    def __init__(self, level: str, vocabulary: list[str]) -> None:
        if level not in LEVELS:
            raise ValueError(f"level must be one of {LEVELS}, got {level!r}")
        self.level = level
        self.vocabulary = vocabulary
        self._ids = {token: i for i, token in enumerate(vocabulary)}

    @classmethod
    def from_text(cls, level: str, text: str) -> "Tokenizer":
        """A tokenizer that knows every token of `text`."""
        known = sorted(set(cls(level, []).split(text)))
        return cls(level, ["<unk>", *known])  # splitting never yields "<unk>" as one token

    def __len__(self) -> int:
        return len(self.vocabulary)

    def split(self, text: str) -> list[str]:
        """The tokens of `text` as strings, known or not."""
        return list(text) if self.level == "char" else _WORDS.findall(text.lower())

    def unknown(self, text: str) -> list[str]:
        """The tokens of `text` that the vocabulary lacks, each once, in order."""
        return [t for t in dict.fromkeys(self.split(text)) if t not in self._ids]

    def encode(self, text: str) -> Tensor:
        """The ids of the tokens of `text`, int64, of shape (tokens,)."""
        return torch.tensor([self._ids.get(t, UNKNOWN) for t in self.split(text)], dtype=torch.long)

    def decode(self, ids: Iterable[int]) -> str:
        """Text whose tokens have these ids."""
        tokens = [self.vocabulary[i] for i in ids]
        if self.level == "char":
            return "".join(tokens)
        text = ""
        for i, token in enumerate(tokens):
            glued = i == 0 or token in _GLUED_LEFT or tokens[i - 1] in _GLUED_RIGHT
            text += token if glued else " " + token
        return text
