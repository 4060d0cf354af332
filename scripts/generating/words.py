"""What a model's tokens say: the bytes of UTF-8 text, or ids of an unknown tokenizer. Torch is not imported."""

from __future__ import annotations

import codecs
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence

from train.config.problems import BadInput, Problem
from train.config.schema import Config
from train.data.sources import holds_text, name_of

NUM_BYTES = 256
# What controls a terminal, but for tab and line feed, or turns the direction of the text that follows.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class Words(ABC):
    """`known`: the number of ids that mean anything, of all that the model knows."""

    known: int

    @abstractmethod
    def encode(self, text: str, what: str = "the prompt") -> list[int]:
        """The ids of a text. Raises BadInput if the model does not know one of them. `what`: what the text is."""

    @abstractmethod
    def reader(self) -> Reader:
        """Turns tokens into text as they come."""


class Reader(ABC):
    @abstractmethod
    def read(self, tokens: Sequence[int], *, last: bool = False) -> str:
        """The text that is certain now that these tokens have come. `last`: no others follow."""


class ByteWords(Words):
    """The bytes of a text as UTF-8."""

    def __init__(self, vocab_size: int) -> None:
        self.known = min(vocab_size, NUM_BYTES)

    def encode(self, text: str, what: str = "the prompt") -> list[int]:
        # A byte that is no UTF-8 reaches a program as a surrogate, on the command line and from the standard input.
        ids = [*text.encode("utf-8", "surrogateescape")]
        if unknown := [byte for byte in ids if byte >= self.known]:
            message = f"{what} has byte {unknown[0]}, but the model knows the bytes below {self.known} only"
            raise BadInput(Problem("token_in_vocabulary", message, "use other characters"))
        return ids

    def reader(self) -> Reader:
        return _ByteReader()


class _ByteReader(Reader):
    """A character is given when its last byte has come. Bytes that are no UTF-8, and CONTROLS, become U+FFFD."""

    def __init__(self) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def read(self, tokens: Sequence[int], *, last: bool = False) -> str:
        text = self.decoder.decode(bytes(tokens), last)
        return CONTROLS.sub("\ufffd", text)


class IdWords(Words):
    """Ids as decimal numbers with spaces between them. `name`: the key and value that chose the data."""

    def __init__(self, vocab_size: int, name: str) -> None:
        self.known, self.name = vocab_size, name

    def encode(self, text: str, what: str = "the prompt") -> list[int]:
        parts = re.split(r"[\s,]+", text.strip())
        if not all(re.fullmatch(r"[0-9]{1,10}", part) for part in parts):
            message = f"{self.name} holds token ids without their tokenizer, so {what} must be numbers"
            raise BadInput(Problem("token_ids", message, "give ids, as 17 4 256"))
        ids = [int(part) for part in parts]
        if max(ids) >= self.known:
            message = f"{what} has token id {max(ids)}, but model.vocab_size={self.known}"
            raise BadInput(Problem("token_in_vocabulary", message, f"use ids below {self.known}"))
        return ids

    def reader(self) -> Reader:
        return _IdReader()


class _IdReader(Reader):
    def __init__(self) -> None:
        self.started = False

    def read(self, tokens: Sequence[int], *, last: bool = False) -> str:
        text = " ".join(map(str, tokens))
        begun, self.started = self.started, self.started or bool(tokens)
        return f" {text}" if begun and tokens else text


def words_of(config: Config) -> Words:
    """What the tokens of a model say that was trained with this config."""
    size = config.model.vocab_size
    return ByteWords(size) if holds_text(config.data.source) else IdWords(size, name_of(config))


class Told:
    """The text of one row, as its tokens come. The text to stop at is not a part of it, so tokens that may be the
    beginning of that are held back."""

    def __init__(self, reader: Reader, stop: Sequence[int] = ()) -> None:
        self.reader, self.stop, self.given = reader, list(stop), 0

    def more(self, tokens: Sequence[int]) -> str:
        """What is new. `tokens`: all of the row."""
        longest = min(len(self.stop) - 1, len(tokens))
        return self._until(tokens, next((n for n in range(longest, 0, -1) if [*tokens[-n:]] == self.stop[:n]), 0))

    def end(self, tokens: Sequence[int], *, stopped: bool) -> str:
        """The rest. `stopped`: the tokens end with the text to stop at."""
        return self._until(tokens, len(self.stop) if stopped else 0, last=True)

    def _until(self, tokens: Sequence[int], held: int, *, last: bool = False) -> str:
        new = tokens[self.given : len(tokens) - held]
        self.given += len(new)
        return self.reader.read(new, last=last)
