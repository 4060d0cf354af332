"""Answers of a trained model to prompts: their texts while they are generated, and what it took."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from scripts.generating.generate import FULL, STOP, Generator, Ids, Row, Sampling, generate
from scripts.generating.words import Told, Words, words_of
from train.checkpoint.whole.trained import Opened
from train.command.resources import source_commit
from train.config.problems import BadInput, Problem
from train.config.world import World
from train.measure.hardware import device_name
from train.model.transformer import Transformer
from train.ranks.distributed import choose_runtime


@dataclass(frozen=True)
class Wanted:
    """How prompts are continued: by at most `tokens` tokens, and until the text `stop` if there is one."""

    tokens: int
    sampling: Sampling
    stop: str = ""


class Answerer:
    """A model, what its tokens say, and how it is wanted to answer. `about`: what must be known of its figures."""

    def __init__(self, model: Transformer, words: Words, wanted: Wanted, about: dict[str, Any] | None = None) -> None:
        self.model, self.words, self.wanted, self.about = model, words, wanted, about or {}

    def answers(self, prompts: Sequence[str]) -> Answers:
        """The answers to these prompts, of which nothing is generated yet. Raises BadInput for a wrong prompt."""
        return Answers(self.model, self.words, [self.words.encode(prompt) for prompt in prompts], self.wanted)


class Answers:
    """The continuations of a batch of prompts. Iterating generates them, and gives what is new of each text after each
    token. Raises BadInput if a prompt has no token, or more than the model reads.

    `rows`: their tokens, and why they ended. `texts`: their texts so far. `first_token_ms`: from the start to the first
    token. `tokens_per_s`: of all rows together, after the first token of each; None if there is no other.
    """

    def __init__(self, model: Transformer, words: Words, prompts: Sequence[Ids], wanted: Wanted) -> None:
        most = model.config.max_seq_len
        _check(prompts, most)
        self.model, self.words, self.prompts, self.wanted = model, words, prompts, wanted
        self.slots = min(most, max(map(len, prompts)) + wanted.tokens)
        self.stop = words.encode(wanted.stop, "the text to stop at") if wanted.stop else []
        self.rows: list[Row] = []
        self.texts = [""] * len(prompts)
        self.first_token_ms = 0.0
        self.tokens_per_s: float | None = None

    @property
    def limit(self) -> str:
        """A sentence if the model has no position left for a row; else nothing."""
        most = self.model.config.max_seq_len
        if not any(row.ended == FULL for row in self.rows):
            return ""
        return f"the answer ends because the model reads at most model.max_seq_len={most:,} tokens, with the prompt"

    def __iter__(self) -> Iterator[list[str]]:
        told = [Told(self.words.reader(), self.stop) for _ in self.prompts]
        over = [False] * len(self.prompts)
        started = time.perf_counter()
        generator = Generator(self.model, len(self.prompts), slots=self.slots)
        wanted, known = self.wanted, self.words.known
        for rows in generate(
            generator, self.prompts, wanted.tokens, sampling=wanted.sampling, stop=self.stop, known=known
        ):
            self.rows = rows
            self._note(time.perf_counter() - started)
            new = ["" if was else _new(one, row) for one, row, was in zip(told, self.rows, over, strict=True)]
            over = [bool(row.ended) for row in self.rows]
            self.texts = [text + more for text, more in zip(self.texts, new, strict=True)]
            yield new

    def _note(self, seconds: float) -> None:
        count = sum(len(row.tokens) for row in self.rows) - len(self.rows)
        if count:
            self.tokens_per_s = count / (seconds - self.first_token_ms / 1e3)
        else:
            self.first_token_ms = seconds * 1e3


def _new(told: Told, row: Row) -> str:
    return told.end(row.tokens, stopped=row.ended == STOP) if row.ended else told.more(row.tokens)


def _check(prompts: Sequence[Ids], most: int) -> None:
    """Raise BadInput if a prompt has no token, or more than the model reads."""
    for prompt in prompts:
        if not prompt:
            message = "the prompt is empty, but the model needs a token to go on from"
            raise BadInput(Problem("prompt", message, "give a prompt of one character or more"))
        if len(prompt) > most:
            message = f"the prompt has {len(prompt):,} tokens, but the model reads at most model.max_seq_len={most:,}"
            raise BadInput(Problem("prompt", message, "give a shorter prompt"))


def store_as_computed(model: Transformer) -> None:
    """Store the weights in the dtype in which they are used, so that bf16 does not cast all of them for every token. No
    result changes. Codes of a compressed model stay as they are."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype is not model.compute_dtype:
            parameter.data = parameter.data.to(model.compute_dtype)


def answerer_of(trained: Opened, device: str, wanted: Wanted) -> Answerer:
    """The trained model on a device: auto, cpu or cuda. Raises BadInput if the machine does not have the device."""
    runtime = choose_runtime(replace(trained.config.runtime, device=device), World.single())
    model = trained.model(device=str(runtime.device))
    store_as_computed(model)
    about = {
        "checkpoint": str(trained.folder),
        "sha256": trained.sha256,
        "precision": trained.config.precision.value,
        **trained.facts,
        "commit": source_commit(),
        "torch": torch.__version__,
        "device": device_name(runtime.device),
        "threads": torch.get_num_threads(),
    }
    return Answerer(model, words_of(trained.config), wanted, about)
