"""The traffic of pipelines: activations to the next stage, their gradients back, and the tied embedding's gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator

from train.config.shapes import element_sizes, stages_of
from train.config.technique import Rank
from train.config.traffic import Traffic


def traffic(rank: Rank) -> Iterator[Traffic]:
    plan, config, m = rank.plan, rank.plan.config, rank.plan.num_microbatches
    kept, used = element_sizes(config.precision)
    shards = plan.degrees["tp"] if config.strategy.shards_sequence() else 1
    shards *= plan.degrees["cp"]
    hidden = config.train.micro_batch_size * (config.train.seq_len // shards) * config.model.dim * used
    own = stages_of(plan, rank.place["pp"])
    onward = sum(s + 1 < plan.num_stages and s + 1 not in own for s in own)  # a V turns without leaving the rank
    back = sum(s > 0 and s - 1 not in own for s in own)
    yield Traffic("pp", "send", onward * m, onward * m * hidden, "activations to the next stage")
    yield Traffic("pp", "send", back * m, back * m * hidden, "their gradients to the stage before")
    if config.model.tie_embeddings and (0 in own) != (plan.num_stages - 1 in own):
        name, table = "embed.weight", (config.model.vocab_size, config.model.dim)
        yield Traffic("pp", "send", 1, math.prod(rank.holds(name, table)) * kept, "the tied embedding's gradient")
