"""Which parameters there are, and which part of each a rank holds: from a plan alone. Torch is not imported.

What is here restates `model.py`, `strategies/tensor.py` and FSDP's rule; `tests/test_explain.py` holds it against them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from train.config import ModelConfig, Optimiser, Precision
from train.plan import Plan
from train.strategies.base import MESH_AXES
from train.strategies.pipeline import Pipeline

Shape = tuple[int, ...]
Shapes = dict[str, Shape]
# the dimension that tensor parallelism splits, by the module's name; norms are whole
TP_DIM = dict.fromkeys(("wq", "wk", "wv", "gate", "up", "embed", "head"), 0) | dict.fromkeys(("wo", "down"), 1)


def coordinates(plan: Plan, rank: int) -> dict[str, int]:
    """The rank's place on every axis: the innermost axis runs fastest."""
    place = {}
    for axis in reversed(MESH_AXES):
        rank, place[axis] = divmod(rank, plan.degrees[axis])
    return place


def block(model: ModelConfig) -> Shapes:
    """One layer's parameters, by their names inside it."""
    head_dim = model.dim // model.num_heads
    return {
        "attention_norm.weight": (model.dim,),
        "attention.wq.weight": (model.num_heads * head_dim, model.dim),
        "attention.wk.weight": (model.num_kv_heads * head_dim, model.dim),
        "attention.wv.weight": (model.num_kv_heads * head_dim, model.dim),
        "attention.wo.weight": (model.dim, model.num_heads * head_dim),
        "feed_forward_norm.weight": (model.dim,),
        "feed_forward.gate.weight": (model.ffn_dim, model.dim),
        "feed_forward.up.weight": (model.ffn_dim, model.dim),
        "feed_forward.down.weight": (model.dim, model.ffn_dim),
    }


def stages_of(plan: Plan, rank: int) -> list[int]:
    """The pipeline stages of a rank of `pp`; without a pipeline the one that is everything."""
    strategy = plan.config.strategy
    return strategy.stages_of(rank, plan.degrees["pp"]) if isinstance(strategy, Pipeline) else [0]


def units(plan: Plan, rank: int) -> Iterator[tuple[str, Shapes]]:
    """The parameters of a rank of `pp` by the module that FSDP gathers as one: of each of its stages `embed`, the
    layers, `norm+head`; tied, the ends of one stage are one, and a rank that holds both ends counts the weight once.
    Whole shapes."""
    model, strategy, last = plan.config.model, plan.config.strategy, plan.num_stages - 1
    layers = [range(model.num_layers)]
    if isinstance(strategy, Pipeline):
        layers = strategy.layers_of(model, plan.config.train.seq_len, plan.degrees["pp"])
    stages = stages_of(plan, rank)
    for stage in stages:
        embed: Shapes = {"embed.weight": (model.vocab_size, model.dim)} if stage == 0 else {}
        ends: Shapes = {"norm.weight": (model.dim,)} if stage == last else {}
        if stage == last and not (model.tie_embeddings and 0 in stages):
            name = "embed.weight" if model.tie_embeddings else "head.weight"  # the embedding's copy has its name
            ends[name] = (model.vocab_size, model.dim)
        tied = model.tie_embeddings and bool(embed) and bool(ends)
        if embed and not tied:
            yield "embed", embed
        for i in layers[stage]:
            yield f"layers.{i}", {f"layers.{i}.{name}": shape for name, shape in block(model).items()}
        if ends:
            yield ("embed+norm+head", embed | ends) if tied else ("norm+head", ends)


def chunk(size: int, degree: int, index: int) -> range:
    """Which of `size` rows a shard has: DTensor's rule, equal chunks, the last ones smaller or empty."""
    most = -(-size // degree)
    return range(min(index * most, size), min((index + 1) * most, size))


def shard(shape: Shape, dim: int, degree: int, index: int) -> Shape:
    return (*shape[:dim], len(chunk(shape[dim], degree, index)), *shape[dim + 1 :])


def tp_shard(plan: Plan, place: dict[str, int], name: str, shape: Shape) -> Shape:
    """What the tp rank at `place` holds of a parameter."""
    dim = TP_DIM.get(name.split(".")[-2])
    return shape if dim is None else shard(shape, dim, plan.degrees["tp"], place["tp"])


def fsdp_place(plan: Plan, place: dict[str, int]) -> tuple[int, int]:
    """(degree, index) of FSDP's shards: over dp_shard and the cp that folds into it, unless DDP takes cp."""
    degree, index = plan.degrees["dp_shard"], place["dp_shard"]
    if "dp_shard" in plan.axes or "dp_replicate" not in plan.axes:
        degree, index = degree * plan.degrees["cp"], index * plan.degrees["cp"] + place["cp"]
    return degree, index


def unknown_holdings(plan: Plan) -> str | None:
    """What of this plan `held` and `state_bytes` do not know yet."""
    without = {
        "mixtures of experts": plan.config.model.num_experts > 0,
        f"strategy={plan.config.strategy.name}": not plan.config.strategy.closed_form,
    }
    return ", ".join(name for name, found in without.items() if found) or None


def held(plan: Plan, rank: int) -> Shapes:
    """The shapes of this rank's parameters between steps, by global name."""
    place = coordinates(plan, rank)
    return {
        name: shard(tp_shard(plan, place, name, shape), 0, *fsdp_place(plan, place))
        for _, unit in units(plan, place["pp"])
        for name, shape in unit.items()
    }


def powersgd_elements(shape: Shape, rank: int) -> int:
    """How many PowerSGD sends of a gradient: two factors if they are fewer than it has, else all of it."""
    rows, size = shape[0], math.prod(shape)
    columns = size // rows
    return min(size, (rows + columns) * min(rank, rows, columns)) if len(shape) > 1 else size


def element_sizes(precision: Precision) -> tuple[int, int]:
    """Bytes of a parameter's element and of an activation's."""
    kept = 8 if precision is Precision.float64 else 4
    return kept, 2 if precision is Precision.bf16 else kept


def state_bytes(plan: Plan, rank: int) -> dict[str, int]:
    """What `TrainStep.state_bytes` reports on this rank after a step."""
    kept, _ = element_sizes(plan.config.precision)
    shapes = held(plan, rank).values()
    parameters = kept * sum(math.prod(shape) for shape in shapes)
    optim = plan.config.optim
    if optim.name is Optimiser.adamw:
        optimiser = 2 * parameters + 4 * len(shapes)  # two moments, and a float32 step count for each parameter
    else:
        optimiser = parameters if optim.momentum > 0 else 0
    return {"parameters": parameters, "gradients": parameters, "optimiser": optimiser}
