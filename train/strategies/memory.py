"""The memory that a rank needs apart from activations, in closed form. Torch is not imported.

state       parameters, gradients at the end of a backward, and optimiser state
unsharded   what FSDP or ZeRO-3 gathers during a step, in addition to the shards:

    strategy                   parameters                            gradients before their reduction
    zero1, FSDP in a pipeline  all of the rank                       all, until the last microbatch
    zero2                      all                                   one block
    fsdp                       two blocks, and those never freed     one block
    ds_zero3                   at most 10^9 elements                 one bucket, which is not counted
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from train.config.groups.optim import AT_ONCE
from train.config.plan import Plan
from train.config.schema import ModelConfig, OptimConfig, Optimiser
from train.config.shapes import Shapes, block, coordinates, element_sizes, is_expert, units, units_by_stage
from train.strategies.data.keys import FsdpKeys
from train.strategies.data.traffic import frees
from train.strategies.deepspeed.split import split_dims
from train.strategies.deepspeed.strategy import DeepSpeed
from train.strategies.techniques import rank_of

GiB = 2**30
LEAST, BLOCK, NUM_CODES = 4096, 256, 256  # of torchao's AdamW8bit: smaller parameters, or others, have whole moments
STEP_COUNT = 4  # bytes that AdamW keeps for a parameter beside its moments
LIVE = 10**9  # the most elements that DeepSpeed's stage 3 keeps gathered by default


@dataclass(frozen=True)
class Needs:
    """Bytes of one rank. `on_host`: the fields whose bytes are in the host's memory if the run is on an accelerator."""

    parameters: int
    gradients: int
    optimiser: int
    unsharded: int
    on_host: frozenset[str] = field(default_factory=frozenset)

    @property
    def state(self) -> int:
        return self.parameters + self.gradients + self.optimiser

    @property
    def offloaded(self) -> int:
        return sum(getattr(self, name) for name in self.on_host)

    @property
    def on_device(self) -> int:
        return self.state + self.unsharded - self.offloaded


def unknown_needs(plan: Plan) -> str | None:
    """The reason why `needs` is not known for this plan; None if it is known."""
    strategy = plan.config.strategy
    known = strategy.closed_form or isinstance(strategy, DeepSpeed)
    return None if known else f"what strategy={strategy.name} holds is not known before it runs"


def needs(plan: Plan, rank: int) -> Needs:
    strategy = plan.config.strategy
    if isinstance(strategy, DeepSpeed):
        return of_deepspeed(plan, strategy, rank)
    offloads = isinstance(strategy, FsdpKeys) and strategy.cpu_offload
    host = frozenset({"parameters", "gradients", "optimiser"} if offloads else ())
    return Needs(**state_bytes(plan, rank), unsharded=unsharded_bytes(plan, rank), on_host=host)


def parameter_shapes(plan: Plan, rank: int) -> Shapes:
    """The shapes of this rank's parameters between steps, by global name."""
    here = rank_of(plan, rank)
    return {name: here.holds(name, shape) for _, unit in units(plan, here.place["pp"]) for name, shape in unit.items()}


def state_bytes(plan: Plan, rank: int) -> dict[str, int]:
    """The bytes that `TrainStep.state_bytes` reports on this rank after a step."""
    kept, _ = element_sizes(plan.config.precision)
    shapes = parameter_shapes(plan, rank).values()
    sizes = [math.prod(shape) for shape in shapes]
    parameters, optimiser = kept * sum(sizes), sum(optimiser_bytes(plan.config.optim, size, kept) for size in sizes)
    return {"parameters": parameters, "gradients": parameters, "optimiser": optimiser}


def optimiser_bytes(optim: OptimConfig, elements: int, kept: int) -> int:
    """What the optimiser keeps for a rank's part of a parameter, of so many elements of `kept` bytes: for AdamW two
    moments, and a float32 count of steps. In 8 bits a moment is a code for each element, a float32 scale for each
    block, and torchao's table of codes."""
    if optim.name is Optimiser.sgd:
        return kept * elements if optim.momentum > 0 else 0
    moment = kept * elements
    if optim.name is Optimiser.adamw8bit and elements >= LEAST and elements % BLOCK == 0:
        moment = elements + 4 * (elements // BLOCK) + 4 * NUM_CODES
    return 2 * moment + STEP_COUNT


def update_bytes(optim: OptimConfig, elements: int, kept: int) -> int:
    """What the update of a parameter of so many elements needs for a moment. A fused update needs nothing; the one in 8
    bits 49 bytes for an element of float32, of AT_ONCE elements at most, mostly to quantise the moments again
    (tests/test_eight_bit.py measures it)."""
    return (5 * kept + 29) * min(elements, AT_ONCE) if optim.name is Optimiser.adamw8bit else 0


def num_parameters(model: ModelConfig) -> tuple[int, int]:
    """(The number of parameters, how many of them one token uses)."""
    ends = model.dim * (1 + model.vocab_size * (1 if model.tie_embeddings else 2))
    layer = block(model)
    total = sum(map(math.prod, layer.values()))
    experts = sum(math.prod(shape) for name, shape in layer.items() if is_expert(name))
    idle = experts // model.num_experts * max(model.num_experts - model.top_k, 0) if model.num_experts else 0
    return ends + model.num_layers * total, ends + model.num_layers * (total - idle)


def unsharded_bytes(plan: Plan, rank: int) -> int:
    """The bytes that FSDP gathers during a step, and those of gradients before their reduction. None are needed if it
    shards over one rank."""
    here = rank_of(plan, rank)
    if not plan.config.strategy.uses_fsdp():
        return 0
    kept, used = element_sizes(plan.config.precision)
    stays, blocks, gradients = 0, [0], [0]
    for _, name, unit in units_by_stage(plan, here.place["pp"], copies=True):
        elements = sum(
            math.prod(here.computes(key, shape))
            for key, shape in unit.items()
            if (split := here.stored_split(key)) and split.degree > 1
        )
        size = elements * (kept if name.startswith("embed") else used)
        if frees(plan, name):
            blocks.append(size)
        else:
            stays += size
        gradients.append(elements)
    summed = kept * sum(gradients) if gradients_stay_whole(plan) else used * max(gradients)
    return stays + sum(sorted(blocks)[-2:]) + summed


def keeps_parameters_sharded(plan: Plan) -> bool:
    """Whether parameters stay sharded during a step, as in ZeRO's stage 3."""
    strategy = plan.config.strategy
    return not isinstance(strategy, FsdpKeys | DeepSpeed) or strategy.zero_stage == 3


def unsharded_in_a_step(plan: Plan) -> str:
    """What an engine gathers during a step, in words."""
    if isinstance(plan.config.strategy, DeepSpeed):
        return "at most 10^9 elements of the parameters"
    frees = plan.config.strategy.frees_parameters()
    gradients = "all gradients until the last microbatch" if gradients_stay_whole(plan) else "one block's gradients"
    gathered = "the parameters of two blocks and of the head" if frees else "all parameters"
    return f"{gathered}, and {gradients}"


def gradients_stay_whole(plan: Plan) -> bool:
    """Whether FSDP sums the unsharded gradients of all microbatches, and reduces them after the last one."""
    return plan.num_microbatches > 1 and plan.config.strategy.reduces_once()


def of_deepspeed(plan: Plan, strategy: DeepSpeed, rank: int) -> Needs:
    """The memory of ZeRO (docs/deepspeed.md), in float32. Stages 1 to 3 keep a second copy of the weights to update."""
    shapes = deepspeed_shapes(plan, coordinates(plan, rank)["pp"])
    sizes = [4 * math.prod(shape) for shape in shapes.values()]
    stage, ranks, total = strategy.zero_stage, plan.degrees["dp_shard"], sum(sizes)
    moments = 2 if plan.config.optim.name is Optimiser.adamw else int(plan.config.optim.momentum > 0)
    small = sum(size for size in sizes if size < 4 * strategy.whole_below) if stage == 3 else 0
    sharded = -(-total // ranks)
    copies = moments + (stage > 0)
    return Needs(
        parameters=-(-(total - small) // ranks) + small if stage == 3 else total,
        gradients=sharded if stage >= 2 else total,
        optimiser=copies * (sharded if stage >= 1 else total),
        unsharded=min(total, 4 * LIVE) if stage == 3 and ranks > 1 else 0,
        on_host=frozenset({"optimiser"} if strategy.offload_optimizer else ()),
    )


def deepspeed_shapes(plan: Plan, stage: int) -> Shapes:
    """The shapes on one stage, flattened, with what AutoTP splits."""
    tp = plan.degrees["tp"]
    dims = split_dims(plan.config.model, tp)
    return {
        name: (math.prod(shape) // (tp if name.split(".")[-2] in dims else 1),)
        for _, unit in units(plan, stage)
        for name, shape in unit.items()
    }
