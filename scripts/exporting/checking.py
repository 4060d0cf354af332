"""An artefact in its own runtime against the eager model: logits after prompts and after each token, and the loss.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from scripts.exporting.artefact import Artefact
from scripts.exporting.running.opened import Runner
from scripts.exporting.targets import BOUND, EXACT
from train.checkpoint.whole.trained import validation_loss
from train.config.problems import Reported
from train.config.schema import Config
from train.data.corpus import Corpus
from train.model.transformer import Transformer

PROMPTS = 20
CONTINUED = 3  # of the prompts, the longest, are continued token by token
SLOW_ROWS = 2  # of validation, for a runtime that is asked for each token
TIMED = 64  # tokens


class Differs(Reported):
    """The runtime does not compute what the eager model does."""


def compare(model: Transformer, runner: Runner, artefact: Artefact, config: Config, corpus: Corpus) -> dict[str, float]:
    """The largest errors, and the losses of both. Raises Differs for logits that are not those of eager, where nothing
    is quantised."""
    seen = _Seen(artefact.target.log_probabilities)
    if artefact.target.log_probabilities:
        config, corpus = _shorter(config, corpus)
    rows = _rows(corpus)
    with torch.no_grad():
        for row, length in zip(rows, _lengths(rows.shape[1]), strict=True):
            seen.add("prompt_error", runner.start(row[:length].numpy()), model(row[None, :length])[0, -1])
        for row in rows[-CONTINUED:]:
            expected, begin = model(row[None])[0], len(row) // 3 + 1
            runner.start(row[:begin].numpy())
            for position in range(begin, len(row)):
                seen.add("decode_error", runner.step(int(row[position])), expected[position])
        if not artefact.target.log_probabilities:  # its whole sequences are prompts too
            seen.add("whole_error", runner.logits(rows[:2].numpy()), model(rows[:2]))
    worst = max(seen.errors.values())
    if artefact.quant in EXACT and not worst <= BOUND:
        kind = "log-probabilities" if artefact.target.log_probabilities else "logits"
        raise Differs(
            f"{artefact.target.name}: its {kind} are up to {worst:.1e} from those of eager, and the bound is "
            f"{BOUND:.0e}: nothing was written"
        )
    return seen.errors | _losses(model, runner, config, corpus)


def decode_speed(runner: Runner, corpus: Corpus) -> tuple[float, float]:
    """The tokens/s of decoding, and how many tokens each has before it, on average."""
    row = _rows(corpus)[-1].numpy()
    count = max(min(TIMED, len(row) // 2 - 1), 1)
    prompt = row[: max(len(row) - count - 1, 1)]
    return runner.speed(prompt, count)[1], len(prompt) + count / 2


class _Seen:
    """The largest errors by name. `normalise`: whether both sides are made log-probabilities first."""

    def __init__(self, normalise: bool) -> None:
        self.normalise = normalise
        self.errors: dict[str, float] = {}

    def add(self, name: str, found: np.ndarray, expected: Tensor) -> None:
        one = torch.from_numpy(np.asarray(found))
        if self.normalise:
            one, expected = one.log_softmax(-1), expected.log_softmax(-1)
        error = float((one - expected).abs().max())
        self.errors[name] = max(self.errors.get(name, 0.0), error if error == error else float("inf"))


def _rows(corpus: Corpus) -> Tensor:
    """PROMPTS windows of the validation part, spread over it."""
    return corpus.validation_batch(0, 1, PROMPTS, slice(None))[0]


def _lengths(most: int) -> list[int]:
    """PROMPTS lengths from 1 to `most`, spread evenly."""
    return [int(length) for length in np.linspace(1, most, PROMPTS)]


def _shorter(config: Config, corpus: Corpus) -> tuple[Config, Corpus]:
    """The same with fewer validation tokens, for a runtime in which each is a request of its own, and with sequences
    that leave room for a token that follows."""
    fewer = dataclasses.replace(config.train, eval_batches=1, global_batch_size=SLOW_ROWS)
    seq_len = min(corpus.seq_len, config.model.max_seq_len - 1)
    return dataclasses.replace(config, train=fewer), dataclasses.replace(corpus, seq_len=seq_len)


def _losses(model: Transformer, runner: Runner, config: Config, corpus: Corpus) -> dict[str, float]:
    """The validation loss of both on the same tokens."""

    def loss(logits_of: Callable[[Tensor], Tensor]) -> float:
        return validation_loss(logits_of, config, corpus)

    return {"loss": loss(lambda tokens: torch.from_numpy(runner.logits(tokens.numpy()))), "eager_loss": loss(model)}
