"""Configs drawn by hypothesis or by a seed: any preset, with degrees, options, a model and a batch, in a world of up to
64."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Protocol, TypeVar

from hypothesis import strategies as st

from train.command import cli
from train.command.validate import validate
from train.config.plan import Plan
from train.config.rules.idle import unread
from train.config.rules.read_when import READ_WHEN
from train.config.schema import Config
from train.strategies.context.keys import CP_METHODS
from train.strategies.data.keys import COMM_HOOKS
from train.strategies.deepspeed.strategy import DeepSpeed
from train.strategies.pipeline.placement import SCHEDULES
from train.strategies.pipelined import Pipeline

PRESETS = sorted(path.stem for path in (Path(__file__).parent.parent / "configs" / "strategy").glob("*.yaml"))
NATIVE = [name for name in PRESETS if not name.startswith("ds_")]
# what everything is drawn over: small, so that 200 steps take a minute
BASE = {
    **{"model.dim": 48, "model.num_layers": 4, "model.ffn_dim": 48, "model.num_heads": 12, "model.num_kv_heads": 12},
    **{"train.seq_len": 32, "train.micro_batch_size": 1},
}
DEGREES = (-1, 1, 2, 3, 4, 8)
VALUES = {
    "train.micro_batch_size": (1, 2),
    "train.global_batch_size": (2, 8, 12, 24, 48, 64),
    "train.seq_len": (16, 24, 32, 48),
    "train.activation_checkpointing": ("none", "full", "selective"),
    "train.clip_norm": (0, 1),
    "model.num_layers": (2, 3, 4, 8, 16),
    "model.num_heads": (2, 3, 4, 8, 12, 24),
    "model.num_kv_heads": (1, 2, 3, 4, 12),
    "model.ffn_dim": (48, 50, 96),
    "model.vocab_size": (256, 259, 300),
    "model.tie_embeddings": (False, True),
    "model.dropout": (0, 0.1),
    "model.attention": ("sdpa", "eager"),
    "model.num_experts": (0, 4, 6, 8),
    "model.expert_ffn_dim": (0, 24, 48),
    "model.num_shared_experts": (0, 1),
    "model.top_k": (1, 2, 8),
    "model.balance": ("none", "aux_loss", "bias"),
    "data.ignore_token": ("null", 32, 400),
    "optim.name": ("adamw", "sgd"),
    "optim.momentum": (0, 0.9),
    "precision": ("float64", "float32", "bf16"),
}
SPMD = {
    "strategy.ep": ("null", -1, 1, 2, 4),
    "strategy.cp_method": (*CP_METHODS, "zigzag"),
    "strategy.sequence_parallel": (True, False),
    "strategy.loss_parallel": (True, False),
    "strategy.zero_stage": (0, 1, 2, 3),
    "strategy.reshard_after_forward": (True, False),
    "strategy.cpu_offload": (False, True),
    "strategy.bucket_mb": (25, 0.01),
    "strategy.comm_hook": [*COMM_HOOKS],
    "strategy.async_tp": (False, True),
}
PIPELINE = SPMD | {
    "strategy.schedule": (*SCHEDULES, "zigzag"),
    "strategy.stages_per_rank": ("null", 1, 2, 3),
    "strategy.layers_per_stage": ("[]", "[1,3]", "[2,2,2,2]", "[3,1,3,1]"),
}
DEEPSPEED = {
    "strategy.zero_stage": (0, 1, 2, 3),
    "strategy.offload_optimizer": (False, True),
    "strategy.bucket_mb": (25, 0.01),
    "strategy.whole_below": (0, 1000),
}
T = TypeVar("T")


class Choices(Protocol):
    """Who chooses."""

    def flag(self) -> bool: ...

    def one(self, values: Sequence[T]) -> T: ...

    def some(self, values: Sequence[T], most: int) -> list[T]:
        """Up to `most` different values."""
        ...


@dataclass(frozen=True)
class OfHypothesis:
    """Prefers what is simple and what is at the ends, and makes failures smaller."""

    draw: st.DrawFn

    def flag(self) -> bool:
        return self.draw(st.booleans())

    def one(self, values: Sequence[T]) -> T:
        return self.draw(st.sampled_from(values))

    def some(self, values: Sequence[T], most: int) -> list[T]:
        return self.draw(st.lists(st.sampled_from(values), max_size=most, unique=True))


@dataclass(frozen=True)
class BySeed:
    """Everything is equally likely, and a seed gives the same with every version of hypothesis."""

    random: random.Random

    def flag(self) -> bool:
        return self.random.random() < 0.5

    def one(self, values: Sequence[T]) -> T:
        return self.random.choice(values)

    def some(self, values: Sequence[T], most: int) -> list[T]:
        return self.random.sample(values, self.random.randint(0, most))


@dataclass(frozen=True)
class Drawn:
    overrides: tuple[str, ...]
    world_size: int

    @property
    def plan(self) -> Plan:
        preset, *words = self.overrides
        return Plan(composed(preset), self.world_size).override(" ".join(words))

    def mended(self) -> "Drawn":
        """The result for a user who applies the proposed overrides of every problem, until there is no problem."""
        one = self
        for _ in range(10):
            overrides = [p.overrides for p in validate(one.plan.config, one.world_size) if p.overrides]
            if not overrides:
                break
            words = dict(word.split("=", 1) for word in (*one.overrides, *overrides[0]))
            size = int(words.pop("nproc", one.world_size))
            one = Drawn(tuple(f"{key}={value}" for key, value in words.items()), size)
        return one


@cache
def composed(preset: str) -> Config:
    config = cli.parse(cli.parser("test", ""), [preset])[0]
    return replace(config, runtime=replace(config.runtime, device="cpu"))


@st.composite
def drawn(draw: st.DrawFn, presets: list[str] = PRESETS, most_changes: int = 8, compiled: bool = True) -> Drawn:
    """`most_changes`: the largest number of changed keys, without degrees."""
    return chosen(OfHypothesis(draw), presets, most_changes=most_changes, compiled=compiled)


def chosen(choices: Choices, presets: Sequence[str], *, most_changes: int, compiled: bool) -> Drawn:
    preset = f"strategy={choices.one(presets)}"
    strategy = composed(preset).strategy
    axes = ("dp_replicate", "dp_shard", "tp", *(() if isinstance(strategy, DeepSpeed) else ("cp",)))
    axes += ("pp",) if isinstance(strategy, Pipeline | DeepSpeed) else ()
    words: dict[str, object] = {
        f"strategy.{axis}": choices.one(DEGREES) for axis in strategy.mesh_axes() if choices.flag()
    }
    for axis in choices.some(axes, 1):
        words[f"strategy.{axis}"] = choices.one(("null", 0, *DEGREES))
    own = DEEPSPEED if isinstance(strategy, DeepSpeed) else PIPELINE if isinstance(strategy, Pipeline) else SPMD
    keys = VALUES | own | ({"compile.enabled": (False, True)} if compiled else {})
    for key in choices.some(sorted(keys), most_changes):
        words[key] = choices.one(keys[key])
    if words.get("model.num_experts"):
        words.setdefault("model.expert_ffn_dim", 24)
    elif "ep" in preset or "moe" in preset:
        words |= {"model.num_experts": 8, "model.expert_ffn_dim": 24}
    words = BASE | words
    if choices.one(range(4)):  # else with the keys that the run does not read, if some were drawn
        for key in unread({"optim.name": "adamw"} | words, READ_WHEN):
            del words[key]
    size = choices.one((1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64))
    return Drawn((preset, *(f"{key}={value}" for key, value in words.items())), size)
