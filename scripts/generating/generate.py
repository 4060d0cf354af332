"""Tokens one after another: a batch of prompts is read, and every row is continued until it has enough.

Shapes: B batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scripts.generating.cache import CachedModel
from train.config.problems import BadInput, Problem
from train.model.transformer import Transformer

Ids = Sequence[int]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. `temperature`: the logits are divided by it; 0 takes the most likely token.
    `top_k`: only so many of the most likely tokens may be drawn; None allows all."""

    temperature: float = 0.0
    top_k: int | None = None
    seed: int = 0


class Generator:
    """A model that reads prompts (`prefill`) and then one token of each row at a time (`decode`).

    `batch`: the number of rows. `slots`: the most tokens that a row may have, with padding; model.max_seq_len if not
    given. `room`: how many more tokens can be read. Raises ValueError if prompts or slots do not fit.
    """

    def __init__(self, model: Transformer, batch: int = 1, *, slots: int | None = None) -> None:
        self.batch = batch
        self.cached = CachedModel(model, batch, slots)

    @property
    def room(self) -> int:
        return self.cached.slots - self.cached.filled

    @property
    def device(self) -> torch.device:
        return self.cached.keys.device

    def prefill(self, prompts: Sequence[Ids]) -> Tensor:
        """Forget what was read before, read these prompts, and give the logits BV of what follows. Prompts of several
        lengths are padded at the left."""
        if len(prompts) != self.batch or not all(prompts):
            raise ValueError(
                f"{len(prompts)} prompts, the shortest of {min(map(len, prompts), default=0)} tokens, for "
                f"a batch of {self.batch} prompts of 1 token or more"
            )
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        self.cached.start(padding)
        rows = [[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
        return self.cached(torch.tensor(rows, device=self.device), last=True)[:, 0]

    def decode(self, tokens_B: Tensor) -> Tensor:
        """Read one token of each row, and give the logits BV of what follows."""
        return self.cached(tokens_B.to(self.device)[:, None], last=True)[:, 0]


def choose(logits_BV: Tensor, sampling: Sampling, random: torch.Generator) -> Tensor:
    """The next token of each row, int64 B. It is drawn on the CPU, so that a seed means the same on every device.
    Raises BadInput if a logit is NaN or infinite."""
    logits_BV = logits_BV.cpu().double()
    if not bool(logits_BV.isfinite().all()):
        message = "the model's logits are not finite, so it cannot choose a token"
        raise BadInput(Problem("finite", message, "use an earlier checkpoint, or another run"))
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    # The largest becomes 0, so that no temperature makes it infinite.
    scaled_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scaled_BV.shape[-1]:
        best, where = scaled_BV.topk(sampling.top_k)
        return where.gather(-1, torch.multinomial(best.softmax(-1), 1, generator=random))[:, 0]
    return torch.multinomial(scaled_BV.softmax(-1), 1, generator=random)[:, 0]


# Why a row has ended: it has as many tokens as were asked for, the text to stop at, or the model has no position left.
ENOUGH, STOP, FULL = "tokens", "stop", "limit"


@dataclass
class Row:
    """A continuation so far. `ended`: why no more tokens follow; empty while they do."""

    tokens: list[int]
    ended: str = ""


def generate(
    generator: Generator,
    prompts: Sequence[Ids],
    tokens: int,
    *,
    sampling: Sampling | None = None,
    stop: Ids = (),
    known: int | None = None,
) -> Iterator[list[Row]]:
    """The rows after each new token: the same objects, each time one token longer unless they have ended.

    A row ends after `tokens` tokens, or when its newest tokens are those of `stop`, which it then holds at its end, or
    when the model has read as many tokens as it has positions. `known`: only ids below it are chosen.
    """
    sampling = sampling or Sampling()
    random = torch.Generator("cpu").manual_seed(sampling.seed)
    rows = [Row([]) for _ in prompts]
    logits_BV = generator.prefill(prompts)
    while True:
        chosen_B = choose(logits_BV[:, :known], sampling, random)
        for row, token in zip(rows, chosen_B.tolist(), strict=True):
            if not row.ended:
                row.tokens.append(token)
                row.ended = _ending(row.tokens, tokens, stop, generator.room)
        yield rows
        if all(row.ended for row in rows):
            return
        logits_BV = generator.decode(chosen_B)


def _ending(made: list[int], tokens: int, stop: Ids, room: int) -> str:
    if stop and made[-len(stop) :] == list(stop):
        return STOP
    if len(made) >= tokens:
        return ENOUGH
    return FULL if room == 0 else ""
