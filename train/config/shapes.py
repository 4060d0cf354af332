"""The names and shapes of the parameters of a model, and of a rank of a pipeline. Torch is not imported.

These names and shapes repeat `train/model/transformer.py`; `tests/test_explain.py` compares them with the model.
"""

from __future__ import annotations

from collections.abc import Iterator

from train.config.plan import Plan
from train.config.schema import ModelConfig, Precision
from train.config.strategy import MESH_AXES

Shape = tuple[int, ...]
Shapes = dict[str, Shape]


def coordinates(plan: Plan, rank: int) -> dict[str, int]:
    """The rank's index on every axis. The index on the innermost axis changes fastest."""
    place = {}
    for axis in reversed(MESH_AXES):
        rank, place[axis] = divmod(rank, plan.degrees[axis])
    return place


def block(model: ModelConfig) -> Shapes:
    """The parameters of one layer, by their names within the layer."""
    head_dim = model.dim // model.num_heads
    attention = {
        "attention_norm.weight": (model.dim,),
        "attention.wq.weight": (model.num_heads * head_dim, model.dim),
        "attention.wk.weight": (model.num_kv_heads * head_dim, model.dim),
        "attention.wv.weight": (model.num_kv_heads * head_dim, model.dim),
        "attention.wo.weight": (model.dim, model.num_heads * head_dim),
        "feed_forward_norm.weight": (model.dim,),
    }
    if model.num_experts == 0:
        return attention | feed_forward("feed_forward", model.dim, model.ffn_dim)
    count, width = model.num_experts, model.expert_ffn_dim
    mixture: Shapes = {
        "feed_forward.router.weight": (count, model.dim),
        "feed_forward.experts.gate": (count, width, model.dim),
        "feed_forward.experts.up": (count, width, model.dim),
        "feed_forward.experts.down": (count, model.dim, width),
    }
    if model.num_shared_experts:
        mixture |= feed_forward("feed_forward.shared", model.dim, model.num_shared_experts * width)
    return attention | mixture


def feed_forward(name: str, dim: int, width: int) -> Shapes:
    return {f"{name}.gate.weight": (width, dim), f"{name}.up.weight": (width, dim), f"{name}.down.weight": (dim, width)}


def stages_of(plan: Plan, rank: int) -> list[int]:
    """The pipeline stages of a rank of `pp`. Without a pipeline there is one stage, the whole model."""
    return plan.config.strategy.stages_of(rank, plan.degrees["pp"])


def units(plan: Plan, rank: int) -> Iterator[tuple[str, Shapes]]:
    """The parameters of a rank of `pp`, with their whole shapes, by the module that FSDP gathers as one unit: for each
    stage `embed`, each layer, and `norm+head`. With tied embeddings, both ends of one stage are one unit, and a rank
    that has both ends counts the tied weight once."""
    for _, name, shapes in units_by_stage(plan, rank):
        yield name, shapes


def units_by_stage(
    plan: Plan, rank: int, *, copies: bool = False, first_layers: bool = False
) -> Iterator[tuple[int, str, Shapes]]:
    """As `units`, with the stage of each unit. `copies`: the last stage has its own copy of the tied weight even on the
    first stage's rank, as FSDP and DDP wrap each stage separately, and gather and reduce both copies. `first_layers`:
    only the first layer of each stage, as all have the same shapes."""
    model, last, layers = plan.config.model, plan.num_stages - 1, plan.layers_of_stages
    stages, layer = stages_of(plan, rank), block(plan.config.model)
    for stage in stages:
        embed: Shapes = {"embed.weight": (model.vocab_size, model.dim)} if stage == 0 else {}
        ends: Shapes = {"norm.weight": (model.dim,)} if stage == last else {}
        if stage == last and (copies or not (model.tie_embeddings and 0 in stages)):
            name = "embed.weight" if model.tie_embeddings else "head.weight"  # the embedding's copy has its name
            ends[name] = (model.vocab_size, model.dim)
        tied = model.tie_embeddings and bool(embed) and bool(ends)
        if embed and not tied:
            yield stage, "embed", embed
        for i in layers[stage][:1] if first_layers else layers[stage]:
            yield stage, f"layers.{i}", {f"layers.{i}.{name}": shape for name, shape in layer.items()}
        if ends:
            yield (stage, "embed+norm+head", embed | ends) if tied else (stage, "norm+head", ends)


def token_dim(sequences: int, degree: int) -> int:
    """The dimension of activations BTD that sequence parallelism splits. Everything between split layers works on each
    token alone, so any tokens will do: whole sequences (0) where every rank can have equally many, because parts of the
    first dimension are sent and received without copies; else parts of each sequence (1)."""
    return 0 if sequences % degree == 0 else 1


def chunk(size: int, degree: int, index: int) -> range:
    """The rows, of `size`, that a shard has. As in DTensor, chunks are equal, but the last ones may be smaller or
    empty."""
    most = -(-size // degree)
    return range(min(index * most, size), min((index + 1) * most, size))


def shard(shape: Shape, dim: int, degree: int, index: int) -> Shape:
    return (*shape[:dim], len(chunk(shape[dim], degree, index)), *shape[dim + 1 :])


def is_expert(name: str) -> bool:
    return ".experts." in name


def kv_shards(model: ModelConfig, tp: int) -> int:
    """The number of parts into which `tp` ranks split the keys and values: one per rank, but not more than there are KV
    heads. If there are fewer KV heads than ranks, the same number of neighbouring ranks have a copy of each head."""
    return min(tp, model.num_kv_heads)


def folded_place(plan: Plan, place: dict[str, int]) -> tuple[int, int]:
    """(degree, index) of the rank among the ranks that FSDP shards over: those of dp_shard and of cp, unless DDP is
    used over cp. Expert parallelism folds over the same ranks, the innermost first."""
    degree, index = plan.degrees["dp_shard"], place["dp_shard"]
    if "dp_shard" in plan.axes or "dp_replicate" not in plan.axes:
        degree, index = degree * plan.degrees["cp"], index * plan.degrees["cp"] + place["cp"]
    return degree, index


def element_sizes(precision: Precision) -> tuple[int, int]:
    """(bytes per element of a parameter, bytes per element of an activation)."""
    kept = 8 if precision is Precision.float64 else 4
    return kept, 2 if precision.casts else kept
