"""Pipelines: activations to the next stage, their gradients to the one before, the tied embedding's gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator

from train.config.plan import Plan
from train.config.shapes import element_sizes, fsdp_split, model_shard, shard, stages_of
from train.config.traffic import Place, Traffic


def pipeline(plan: Plan, place: Place) -> Iterator[Traffic]:
    if "pp" not in plan.axes:
        return
    config, m = plan.config, plan.num_microbatches
    kept, used = element_sizes(config.precision)
    shards = plan.degrees["tp"] if "tp" in plan.axes and plan.option("sequence_parallel", True) else 1
    shards *= plan.degrees["cp"]
    hidden = config.train.micro_batch_size * (config.train.seq_len // shards) * config.model.dim * used
    own = stages_of(plan, place["pp"])
    onward = sum(s + 1 < plan.num_stages and s + 1 not in own for s in own)  # a V's turn stays on its rank
    back = sum(s > 0 and s - 1 not in own for s in own)
    yield Traffic("pp", "send", onward * m, onward * m * hidden, "activations to the next stage")
    yield Traffic("pp", "send", back * m, back * m * hidden, "their gradients to the stage before")
    if config.model.tie_embeddings and (0 in own) != (plan.num_stages - 1 in own):
        name, table = "embed.weight", (config.model.vocab_size, config.model.dim)
        held = shard(model_shard(plan, place, name, table), *fsdp_split(plan, place, name))
        yield Traffic("pp", "send", 1, math.prod(held) * kept, "the tied embedding's gradient")
