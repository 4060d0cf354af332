"""Every rule between the values of a config and the size of the world, as data: a rule yields the problems it finds.

Pure functions of (config, world_size): no process group, no files, no torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

from train.config import Config
from train.problems import Problem
from train.strategies.base import BATCH_AXES, resolve_degrees
from train.strategies.pipeline import SCHEDULES, Pipeline
from train.strategies.spmd import Spmd

Degrees = dict[str, int]


def validate(config: Config, world_size: int) -> list[Problem]:
    """All problems at once. Rules that compare values run only when every value is in its own range."""
    problems = [problem for section in _sections(config) for problem in out_of_range(*section)]
    problems += degree_range(config)
    if problems:
        return problems
    degrees = resolve_degrees(config.strategy.mesh_axes(), world_size)
    return [problem for rule in RULES for problem in rule(config, degrees, world_size)]


def _sections(config: Config) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield field.name, value


def out_of_range(path: str, section: Any) -> Iterator[Problem]:
    """Numbers outside the range that their field declares."""
    for field in dataclasses.fields(section):
        value, bounds = getattr(section, field.name), field.metadata
        if not bounds or not isinstance(value, int | float):
            continue
        limits = [f"{text} {bounds[key]:g}" for key, text in _COMPARISONS if bounds[key] is not None]
        inside = math.isfinite(value) and all(
            compare(value, bounds[key]) for key, compare in _CHECKS if bounds[key] is not None
        )
        if not inside:
            yield Problem(
                "range",
                f"{path}.{field.name}={value} is out of range",
                f"use a finite value {' and '.join(limits)}",
            )


_COMPARISONS = (("ge", ">="), ("gt", ">"), ("lt", "<"))
_CHECKS: tuple[tuple[str, Callable[[float, float], bool]], ...] = (
    ("ge", lambda x, y: x >= y),
    ("gt", lambda x, y: x > y),
    ("lt", lambda x, y: x < y),
)


def degree_range(config: Config) -> Iterator[Problem]:
    """A degree is a positive number; -1, the ranks that are left, may stand once."""
    axes = config.strategy.mesh_axes()
    for axis, degree in axes.items():
        if degree < 1 and degree != -1:
            yield Problem("degree", f"strategy.{axis}={degree} is no degree", f"use strategy.{axis}=-1, 1, 2, …")
    free = [axis for axis, degree in axes.items() if degree == -1]
    if len(free) > 1:
        names = " and ".join(f"strategy.{axis}" for axis in free)
        yield Problem("one_free_axis", f"{names} are both -1", "let one axis take the ranks that are left")


def world_size_rule(config: Config, degrees: Degrees, world_size: int) -> Iterator[Problem]:
    """The product of the degrees is the world size (a smaller mesh would idle ranks silently)."""
    product = math.prod(degrees.values())
    if product == world_size:
        return
    axes = config.strategy.mesh_axes()
    if not axes:
        yield Problem(
            "single_device",
            f"strategy={config.strategy.name} runs on 1 process, but there are {world_size}",
            "use nproc=1, or strategy=dp",
            ("strategy=dp",),
        )
        return
    shown = " x ".join(f"{axis} {degrees[axis]}" for axis in axes)
    used = math.prod(degrees[axis] for axis in axes if axes[axis] != -1)
    if -1 in axes.values():
        free = next(axis for axis in axes if axes[axis] == -1)
        fix = f"use a number of processes that {used} divides"
        message = f"strategy.{free}=-1 takes the ranks that are left, but {used} does not divide {world_size} processes"
        if world_size < used:
            message = f"{shown} needs {product} processes, but there are {world_size}"
            fix = f"use nproc={product}"
        yield Problem("world_size", message, fix)
    else:
        fix = f"use nproc={product}, or let one axis be -1"
        yield Problem("world_size", f"{shown} needs {product} processes, but there are {world_size}", fix)


def head_shape(config: Config, degrees: Degrees, world_size: int) -> Iterator[Problem]:
    """Heads split the width, into an even number of features (RoPE rotates pairs), and share KV heads evenly."""
    model = config.model
    if model.dim % model.num_heads:
        yield _divisible("head_shape", "model.dim", model.dim, "model.num_heads", model.num_heads)
    elif model.dim // model.num_heads % 2:
        yield Problem(
            "head_shape",
            f"model.dim={model.dim} / model.num_heads={model.num_heads} is odd, but RoPE rotates pairs of features",
            f"use model.dim={2 * model.num_heads * max(model.dim // (2 * model.num_heads), 1)}",
        )
    if model.num_heads % model.num_kv_heads:
        yield _divisible("head_shape", "model.num_heads", model.num_heads, "model.num_kv_heads", model.num_kv_heads)


def sequence_fits(config: Config, degrees: Degrees, world_size: int) -> Iterator[Problem]:
    """RoPE's table is as long as the sequence."""
    if config.model.max_seq_len < config.train.seq_len:
        yield Problem(
            "sequence_fits",
            f"train.seq_len={config.train.seq_len} is more than model.max_seq_len={config.model.max_seq_len}",
            f"use model.max_seq_len={config.train.seq_len}",
            (f"model.max_seq_len={config.train.seq_len}",),
        )


def tensor_parallel(config: Config, degrees: Degrees, world_size: int) -> Iterator[Problem]:
    """tp divides heads, KV heads, feed-forward and vocabulary, and the sequence where that is sharded too."""
    tp, model = degrees["tp"], config.model
    strategy = config.strategy
    split = {
        "model.num_heads": model.num_heads,
        "model.num_kv_heads": model.num_kv_heads,
        "model.ffn_dim": model.ffn_dim,
        "model.vocab_size": model.vocab_size,
    }
    if isinstance(strategy, Spmd) and strategy.sequence_parallel:
        split["train.seq_len"] = config.train.seq_len
    for name, value in split.items():
        if value % tp:
            yield _divisible("tensor_parallel", name, value, "strategy.tp", tp)


def ddp_over_tp(config: Config, degrees: Degrees, world_size: int) -> Iterator[Problem]:
    """DDP broadcasts and buckets plain tensors; tp's weights are DTensors."""
    axes = config.strategy.mesh_axes()
    if "dp_replicate" in axes and "tp" in axes and "dp_shard" not in axes:
        yield Problem(
            "ddp_over_tp",
            f"strategy.dp_replicate={axes['dp_replicate']} (DDP) does not go with strategy.tp={axes['tp']}",
            f"use strategy.dp_replicate=null strategy.dp_shard={axes['dp_replicate']} (FSDP), as fsdp_tp does",
            ("strategy.dp_replicate=null", f"strategy.dp_shard={axes['dp_replicate']}"),
        )


def batch_splits(config: Config, degrees: Degrees, world_size: int) -> Iterator[Problem]:
    """The global batch is a whole number of microbatches on every data rank."""
    train = config.train
    data_ranks = math.prod(degrees[axis] for axis in BATCH_AXES)
    unit = train.micro_batch_size * data_ranks
    if train.global_batch_size % unit:
        nearest = max(round(train.global_batch_size / unit), 1) * unit
        yield Problem(
            "batch_splits",
            f"train.global_batch_size={train.global_batch_size} is not divisible by train.micro_batch_size="
            f"{train.micro_batch_size} x {data_ranks} data ranks",
            f"use train.global_batch_size={nearest}"
            + (", or train.micro_batch_size=1" if train.global_batch_size % data_ranks == 0 else ""),
            (f"train.global_batch_size={nearest}",),
        )


def pipeline(config: Config, degrees: Degrees, world_size: int) -> Iterator[Problem]:
    """A stage has a layer, a schedule is known, 1F1B has a microbatch per stage, and ends do not share weights."""
    strategy, stages = config.strategy, degrees["pp"]
    if not isinstance(strategy, Pipeline):
        return
    if strategy.schedule not in SCHEDULES:
        yield Problem(
            "schedule",
            f"strategy.schedule={strategy.schedule} is not known",
            f"use strategy.schedule={' or '.join(SCHEDULES)}",
            (f"strategy.schedule={SCHEDULES[0]}",),
        )
    if config.model.num_layers < stages:
        yield Problem(
            "layers_and_stages",
            f"model.num_layers={config.model.num_layers} is fewer than strategy.pp={stages} stages",
            f"use model.num_layers={stages} or fewer stages",
            (f"model.num_layers={stages}",),
        )
    train = config.train
    data_ranks = math.prod(degrees[axis] for axis in BATCH_AXES)
    num_microbatches = train.global_batch_size // (train.micro_batch_size * data_ranks)
    if 0 < num_microbatches < stages:
        batch = train.micro_batch_size * data_ranks * stages
        yield Problem(
            "microbatches_and_stages",
            f"train.global_batch_size={train.global_batch_size} gives {num_microbatches} microbatches of "
            f"train.micro_batch_size={train.micro_batch_size}, fewer than strategy.pp={stages} stages",
            f"use train.global_batch_size={batch} or a smaller train.micro_batch_size",
            (f"train.global_batch_size={batch}",),
        )
    if config.model.tie_embeddings and stages > 1:
        yield Problem(
            "tied_over_stages",
            f"model.tie_embeddings=true shares a weight between the first and the last of strategy.pp={stages} stages",
            "use model.tie_embeddings=false",
            ("model.tie_embeddings=false",),
        )


def ignored_token(config: Config, degrees: Degrees, world_size: int) -> Iterator[Problem]:
    """A token that carries no loss is a token."""
    token = config.data.ignore_token
    if token is not None and not 0 <= token < config.model.vocab_size:
        yield Problem(
            "ignored_token",
            f"data.ignore_token={token} is no token id of model.vocab_size={config.model.vocab_size}",
            f"use 0 to {config.model.vocab_size - 1}, or null",
            ("data.ignore_token=null",),
        )


def warm_up(config: Config, degrees: Degrees, world_size: int) -> Iterator[Problem]:
    """A minimum rate is at most the rate."""
    if config.optim.min_lr_ratio > 1:
        yield Problem(
            "warm_up",
            f"optim.min_lr_ratio={config.optim.min_lr_ratio} is more than 1",
            "use a share of optim.lr, 0 to 1",
            ("optim.min_lr_ratio=1",),
        )


def _divisible(rule: str, name: str, value: int, by: str, divisor: int) -> Problem:
    options = [d for d in range(1, min(value, 128) + 1) if value % d == 0]
    shown = f"{', '.join(map(str, options[:-1]))} or {options[-1]}" if len(options) > 1 else "1"
    best = max(d for d in options if d <= divisor)
    return Problem(rule, f"{name}={value} is not divisible by {by}={divisor}", f"use {by}={shown}", (f"{by}={best}",))


RULES: tuple[Callable[[Config, Degrees, int], Iterator[Problem]], ...] = (
    world_size_rule,
    head_shape,
    sequence_fits,
    tensor_parallel,
    ddp_over_tp,
    batch_splits,
    pipeline,
    ignored_token,
    warm_up,
)
