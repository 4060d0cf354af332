"""Choose the sizes that the command line leaves open: the smallest that exercise what the strategy can do.

A typed key is never changed, and neither is a key that a typed preset sets. The defaults of training would hide errors
and take long: one sequence per microbatch, no masked target, a vocabulary that every degree divides.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from train.command.presets import groups, preset_values
from train.command.validate import findings
from train.config.fields import MAX_TOKENS
from train.config.plan import Plan
from train.config.problems import BadInput
from train.config.rule import divisors
from train.config.schema import DataSource
from train.data.corpus import checked
from train.data.text import Source

BYTES = (DataSource.python_docs, DataSource.python_source, DataSource.text, DataSource.jsonl)
SPACE = 32  # a byte that occurs in almost every text
LEAST_LAYERS, LEAST_SEQ_LEN, LEAST_MICROBATCHES = 2, 16, 2
ROWS = 2  # of a microbatch, so that an error that mixes its rows is visible
VOCABULARY = 257  # all bytes, and a prime number: no degree divides it, so that padding and uneven shards are tried
MIXTURE = "moe_tiny"
MOST_LEFT_OUT = 2  # keys that keep their default because no valid config has them all

Words = dict[str, str]


class Typed:
    """The keys that a command line sets: by name, by the name of what contains them, or by a preset."""

    def __init__(self, overrides: Sequence[str]) -> None:
        names = {word.partition("=")[0].lstrip("+~").partition("@")[0] for word in overrides}
        chosen = names & {*groups()}
        self.model = "model" in chosen  # a model's preset stands for the whole model, defaults included
        presets = preset_values(overrides)
        self.keys = (names - chosen) | {key for key in presets if key.partition(".")[0] in chosen}
        # the presets of models take sequences of any length: model.max_seq_len is ${train.seq_len} there
        self.longest_follows = "model.max_seq_len" not in names | presets.keys()

    def __contains__(self, key: str) -> bool:
        parts = key.split(".")
        within = {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
        return (self.model and parts[0] == "model") or bool(within & self.keys)


def needs_mixture(plan: Plan, typed: Typed) -> bool:
    """Whether the strategy needs a mixture of experts, and the command line says nothing about the model's."""
    return "model" not in typed and "ep_needs_experts" in findings(plan)[1]


def choose(plan: Plan, typed: Typed, source: Source | None) -> Words:
    """The chosen values by key; `source`: the tokens, or None if they cannot be read.

    No rule is broken with them. Keys that cannot have the wanted value keep their default, as few as possible. If
    nothing helps, the result is empty, so that the problems that are reported are those of the command line.
    """
    if typed.longest_follows:
        plan = plan.override(f"model.max_seq_len={MAX_TOKENS}")
    for words in _kept(_wanted(plan, typed)):
        with_batches = [words | batch for batch in (*_batches(_with(plan, words), typed), {})]
        valid = [one for one in with_batches if valid_with(_with(plan, one), source)]
        if valid:
            return next((one for one in valid if uneven(_with(plan, one), source)), valid[0])
    return {}


def valid_with(plan: Plan, source: Source | None) -> bool:
    """Whether no rule is broken, neither of the config nor of its data."""
    if any(findings(plan)):
        return False
    try:
        return source is None or bool(checked(plan.config, source))
    except BadInput:
        return False


def uneven(plan: Plan, source: Source | None) -> bool:
    """Whether the microbatches of every data rank have different numbers of targets with a loss, and the data ranks
    too. Otherwise a mean of means would not be noticed."""
    train = plan.config.train
    if source is None or plan.config.data.ignore_token is None:
        return False
    counts = checked(plan.config, source).valid_targets(1, train.global_batch_size)
    by_microbatch = counts.reshape(plan.data_ranks, -1, train.micro_batch_size).sum(2)
    return _differ(by_microbatch) and _differ(by_microbatch.sum(1)[None])


def _differ(counts: np.ndarray) -> bool:
    """Whether every row of an array has at least two different numbers; a single column has nothing to differ from."""
    return counts.shape[1] == 1 or bool((counts.max(1) > counts.min(1)).all())


def _with(plan: Plan, words: Words) -> Plan:
    return plan.override(" ".join(f"{key}={value}" for key, value in words.items()))


def _wanted(plan: Plan, typed: Typed) -> Words:
    """The values that are wanted, of the keys that are not typed. The batch is not among them."""
    unit = 2 * plan.degrees["cp"] * plan.degrees["tp"]  # what context and sequence parallelism split
    wanted = {
        "precision": "float64",
        "model.num_layers": str(max(LEAST_LAYERS, plan.num_stages)),
        "train.seq_len": str(-(-LEAST_SEQ_LEN // unit) * unit),
    }
    if plan.config.data.source in (*BYTES, DataSource.synthetic):
        wanted["model.vocab_size"] = str(VOCABULARY)
    if plan.config.data.source in BYTES:
        wanted["data.ignore_token"] = str(SPACE)
    return {key: value for key, value in wanted.items() if key not in typed}


def _kept(wanted: Words) -> Iterator[Words]:
    """All wanted values, then all but one, then all but two."""
    for count in range(MOST_LEFT_OUT + 1):
        for left_out in itertools.combinations(wanted, min(count, len(wanted))):
            yield {key: value for key, value in wanted.items() if key not in left_out}


def _batches(plan: Plan, typed: Typed) -> list[Words]:
    """The batches and microbatches that the typed keys allow, best first.

    The number of microbatches is at least two and at least the ranks of a pipeline. A microbatch has several rows. If
    possible, the number is neither a degree nor that of the stages: then a wrong factor shows where it comes from.
    """
    train, ranks = plan.config.train, plan.data_ranks
    least = max(LEAST_MICROBATCHES, plan.degrees["pp"])
    whole, micro = "train.global_batch_size" in typed, "train.micro_batch_size" in typed
    rows = train.global_batch_size // ranks
    sizes = [train.micro_batch_size] if micro else divisors(rows) if whole and rows else [ROWS]
    counts = range(least, 2 * max(least, plan.num_stages) + 2)
    factors = {*plan.degrees.values(), plan.num_stages}
    pairs = [(size, count) for size in sizes for count in ([rows // size] if whole else counts)]

    def last(pair: tuple[int, int]) -> tuple[bool, bool, bool, int, int]:
        size, count = pair
        return count < least, size < ROWS, count in factors, abs(size - ROWS), count

    return [
        {
            **({} if whole else {"train.global_batch_size": str(size * count * ranks)}),
            **({} if micro else {"train.micro_batch_size": str(size)}),
        }
        for size, count in sorted(pairs, key=last)
    ]
