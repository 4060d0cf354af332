"""What a proof with these sizes does not try, so that "equals one device" says nothing about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from scripts.verifying.sizes import uneven
from train.config.plan import Plan
from train.data import sources


def left_out(plan: Plan, facts: Mapping[str, Any]) -> list[str]:
    """`facts`: what the proof found out; those that it does not know are missing."""
    return [*_of_batch(plan, facts), *_of_layout(plan), *_of_update(plan, facts)]


def _of_batch(plan: Plan, facts: Mapping[str, Any]) -> Iterator[str]:
    if plan.num_microbatches == 1:
        yield "accumulation (one microbatch)"
    if plan.config.train.micro_batch_size == 1:
        yield "several rows in a microbatch (train.micro_batch_size=1)"
    if not facts.get("masked", plan.config.data.ignore_token is not None):
        yield "masks (every target has a loss)"
    elif plan.num_microbatches * plan.data_ranks > 1 and not uneven(plan, sources.read(plan.config)):
        yield "means of unequal counts (equally many targets in every microbatch, or on every data rank)"


def _of_layout(plan: Plan) -> Iterator[str]:
    vocab_size, tp = plan.config.model.vocab_size, plan.degrees["tp"]
    if tp > 1 and vocab_size % tp == 0:
        yield f"padding (strategy.tp={tp} divides model.vocab_size={vocab_size})"
    shards = plan.degrees["dp_shard"] * plan.degrees["cp"]
    if plan.config.strategy.uses_fsdp() and shards > 1 and vocab_size % shards == 0:
        yield f"uneven shards ({shards} ranks divide every dimension, model.vocab_size={vocab_size} too)"
    degrees = {axis: plan.degrees[axis] for axis in plan.axes}
    if plan.splits_experts:
        degrees["ep"] = plan.ep
    yield from (f"{axis} (strategy.{axis}=1)" for axis, degree in degrees.items() if degree == 1)


def _of_update(plan: Plan, facts: Mapping[str, Any]) -> Iterator[str]:
    if facts.get("copies") is False:
        yield "copies (no two ranks hold the same part of a weight)"
    if facts.get("clipped") is False:
        yield "clipping (the gradient norm is within the limit)"
    lossy = plan.config.strategy.lossy()
    if lossy and lossy.bound is None:
        yield f"{lossy.option} (it starts after these few steps)"
