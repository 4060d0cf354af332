"""Configs for `tests/many_proven.py`, drawn by a seed: small, of every preset, precision and size, and right."""

import random
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import cycle

from tests import drawn
from tests.drawn import NATIVE, PIPELINE, PRESETS, VALUES, BySeed, Drawn, chosen
from tests.rows.base import Row, configured
from train.command.validate import findings
from train.config.plan import Plan
from train.strategies.deepspeed.strategy import DeepSpeed

SEED = 7
SIZES = (2, 3, 4, 6, 8)
PRECISIONS = ("float64", "float32", "bf16")
EVERY = 10  # one of so many is of DeepSpeed, which refuses float64
MOST_CHANGES = 10
MOST_CALLS = 64  # of blocks in a step, by all ranks: a call takes about 10 ms, and there are 4 steps and 2 evaluations
MOST_TOKENS = 512  # of a batch
# bf16 has three digits. In heads of 4 features (a width of 48) the gradients of queries and keys are mostly rounding: a
# layout whose float64 result is right to 2e-15 was at 1.02 of the bound. So bf16 is drawn with heads of 16 features.
WIDE = {"bf16": {"model.dim": "192"}}
# what the one device of the reference does not share
OF_THE_STRATEGY = ("strategy", "train.activation_checkpointing=", "train.micro_batch_size=")
# where nothing else is drawn: a few sequences, with masked targets, so that ranks have different numbers of targets
BASE = {key: str(value) for key, value in drawn.BASE.items()} | {
    **{"train.global_batch_size": "8", "data.ignore_token": "32"},
}
UNCHANGED = {f"{key}={value}" for key, value in drawn.BASE.items()}
# drawn every time, as the rules seldom allow many keys that are drawn at once: those of all presets, those of presets
# with an axis, and those of one preset
OFTEN = {
    "": (
        "train.seq_len",
        "model.vocab_size",
        "model.tie_embeddings",
        "model.num_kv_heads",
        "train.activation_checkpointing",
    ),
    "cp": ("strategy.cp_method",),
    "strategy=dp": ("strategy.comm_hook",),
    "pp": ("strategy.schedule",),
    "tp": ("strategy.sequence_parallel", "strategy.loss_parallel"),
}
MIXTURES = ("model.num_experts", "model.num_shared_experts", "model.top_k", "model.balance")
MIXTURE_OF = 4  # so many configs have one that is a mixture of experts, beside those of ep and moe_3d
SKIPPED = ("model.dropout", "strategy.async_tp", "optim.name", "optim.momentum")  # not proven, or set by the proof


def configs(number: int, seed: int = SEED) -> list[Drawn]:
    """This many different valid configs. Presets and precisions take turns."""
    choices = BySeed(random.Random(seed))
    native = cycle((name, precision) for precision in PRECISIONS for name in NATIVE if name != "single")
    of_deepspeed = cycle((name, precision) for precision in PRECISIONS[1:] for name in PRESETS if name not in NATIVE)
    found: dict[Drawn, None] = {}
    while len(found) < number:
        turns = of_deepspeed if len(found) % EVERY == EVERY - 1 else native
        preset, precision = next(turns)
        found[next(one for one in _draws(choices, preset, precision) if one not in found and is_proven(one))] = None
    return [*found]


def _draws(choices: BySeed, preset: str, precision: str) -> Iterator[Drawn]:
    while True:
        one = chosen(choices, [preset], most_changes=MOST_CHANGES, compiled=False)
        first, *words = one.overrides
        pairs = dict(word.split("=", 1) for word in words if word not in UNCHANGED)
        pairs = BASE | _often(choices, one) | pairs | {"precision": precision} | WIDE.get(precision, {})
        kept = (f"{key}={value}" for key, value in pairs.items() if key not in SKIPPED)
        yield replace(one, overrides=(first, *kept), world_size=choices.one(SIZES)).mended()


def _often(choices: BySeed, one: Drawn) -> dict[str, str]:
    strategy = one.plan.config.strategy
    known = {*VALUES, *(f"strategy.{field.name}" for field in fields(strategy))}
    keys = [key for at in ("", *strategy.mesh_axes(), one.overrides[0]) for key in OFTEN.get(at, ()) if key in known]
    if "ep" in one.overrides[0] or "moe" in one.overrides[0] or choices.one(range(MIXTURE_OF)) == 0:
        keys += MIXTURES
    words = {"model.num_layers": "4" if "pp" in strategy.mesh_axes() else "2"}
    words |= {key: str(choices.one((VALUES | PIPELINE)[key])) for key in keys}
    return words | ({"model.expert_ffn_dim": "24"} if words.get("model.num_experts", "0") != "0" else {})


def is_proven(one: Drawn) -> bool:
    """Whether the config is valid, as is that of one device, small, and of what the proof can judge."""
    plan = one.plan
    if one.world_size not in SIZES or any(findings(plan)):
        return False
    train = plan.config.train
    calls = plan.config.model.num_layers * plan.num_microbatches * plan.world_size // plan.degrees["pp"]
    lossy = plan.config.strategy.lossy()
    starts_late = lossy is not None and lossy.bound is None
    small = calls <= MOST_CALLS and train.global_batch_size * train.seq_len <= MOST_TOKENS
    return small and not starts_late and not any(findings(Plan(configured(row_of(one).reference), 1)))


def row_of(one: Drawn) -> Row:
    own = [word for word in one.overrides if word.startswith(OF_THE_STRATEGY)]
    return Row(one.world_size, tuple(own), tuple(word for word in one.overrides if word not in own))


def with_deepspeed(one: Drawn) -> bool:
    """DeepSpeed changes the state of a process, so its configs have worlds of their own."""
    return isinstance(one.plan.config.strategy, DeepSpeed)
