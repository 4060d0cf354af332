"""What a rank holds in every moment of a step: parameters and their state, what a schedule receives into, the batch.

The bytes of parameters and optimiser are those of `strategies.memory.state_bytes` (tests compare them); here, the
layers of a stage are counted once and multiplied, because a search asks thousands of times.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from train.command.planning.memory.stages import Stage
from train.command.planning.memory.tape import Kinds
from train.config.shapes import element_sizes, units_by_stage
from train.config.strategy import Strategy
from train.config.technique import Rank
from train.strategies.data.keys import FsdpKeys
from train.strategies.memory import optimiser_bytes, update_bytes

TOKEN = 8  # bytes of a token's number


def between_steps(here: Rank, stages: Mapping[int, Stage]) -> Kinds:
    """Bytes by kind. Gradients are those at the end of a step."""
    plan = here.plan
    strategy, train = plan.config.strategy, plan.config.train
    parameters, optimiser = parameters_of(here)
    state = {"parameters": parameters, "gradients": parameters, "optimiser": optimiser}
    if on_host(strategy):
        state = dict.fromkeys(state, 0.0)
    rows = train.global_batch_size // plan.data_ranks
    any_stage = next(iter(stages.values()))
    rope = plan.config.model.max_seq_len * any_stage.sizes.head_dim * any_stage.sizes.wide * len(stages)
    received = sum(one.sizes.shard * (one.before + one.after) for one in stages.values())
    buffers = 2.0 * rows * train.seq_len * TOKEN + rope + copied(here)
    results = sum(one.sizes.shard * one.turns for one in stages.values())
    kept = {"pipeline": plan.num_microbatches * (received - results), "activations": plan.num_microbatches * results}
    return state | {"buffers": buffers} | kept


def copied(here: Rank) -> float:
    """Bytes of the copy of a tied weight on a rank with both ends of a pipeline, which data parallelism wraps apart."""
    plan = here.plan
    strategy, model = plan.config.strategy, plan.config.model
    own = strategy.stages_of(here.place["pp"], plan.degrees["pp"])
    apart = plan.num_stages > 1 and {0, plan.num_stages - 1} <= {*own} and (strategy.uses_fsdp() or strategy.uses_ddp())
    if not (model.tie_embeddings and apart):
        return 0.0
    kept, _ = element_sizes(plan.config.precision)
    return float(kept * math.prod(here.holds("embed.weight", (model.vocab_size, model.dim))))


def updating(here: Rank) -> float:
    """The bytes that the optimiser's update of one parameter needs for a moment, at the most."""
    config = here.plan.config
    kept, _ = element_sizes(config.precision)
    if on_host(config.strategy) or not update_bytes(config.optim, 1, kept):
        return 0.0
    units = (unit.items() for _, _, unit in units_by_stage(here.plan, here.place["pp"], first_layers=True))
    sizes = (math.prod(here.holds(key, shape)) for unit in units for key, shape in unit)
    return float(max(update_bytes(config.optim, size, kept) for size in sizes))


def on_host(strategy: Strategy) -> bool:
    """Whether the state is in the host's memory, where the update is computed too."""
    return isinstance(strategy, FsdpKeys) and strategy.cpu_offload


def parameters_of(here: Rank) -> tuple[float, float]:
    """The bytes of the rank's parameters, and of what the optimiser keeps for them."""
    kept, _ = element_sizes(here.plan.config.precision)
    elements = optimiser = 0
    for stage, name, shapes in units_by_stage(here.plan, here.place["pp"], first_layers=True):
        times = len(here.plan.layers_of_stages[stage]) if name.startswith("layers.") else 1
        sizes = [math.prod(here.holds(key, shape)) for key, shape in shapes.items()]
        elements += times * sum(sizes)
        optimiser += times * sum(optimiser_bytes(here.plan.config.optim, size, kept) for size in sizes)
    return float(kept * elements), float(optimiser)
