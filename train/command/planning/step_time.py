"""The time of a step: roofline for each kind of work, alpha-beta for messages, what of them is hidden, the bubble.

    stage      microbatches x (forward + backward + recomputation + messages that are not hidden)
    pipeline   the slowest stage, and the bubble: the other stages once, divided by the chunks of a rank
    then       reductions that come once a step, and the optimiser's pass over memory

Where the hardware file has a measured profile, its figures take the place of the data sheet's and of the constants that
stand for what they measure (measured.py).

What is hidden, by technique, as the code here does it (DESIGN.md): FSDP's messages run beside the computation, and each
slows the other down; DDP's and ZeRO-1's reductions run beside the last backward; those of `tp` are exposed, unless
async_tp cuts them into pieces; a ring's keys and values run beside attention; a pipeline's sends are exposed, half of
them where a rank has several stages.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from train.command.planning import measured
from train.command.planning.constants import Constants
from train.command.planning.job import LOW_PRECISION
from train.command.planning.links import US, Network, network
from train.command.planning.products import Direction
from train.command.planning.profile import OF_ACTIVATIONS
from train.command.planning.quantities import Message, Quantities, Stage, passes_round, recomputation, tokens_per_step
from train.config.schema import ActivationCheckpointing
from train.config.shapes import element_sizes, token_dim

# bytes per byte of float32 parameters: weight, gradient and two moments are read, three are written; the norm reads the
# gradient again, and it is set to zero
ADAM_BYTES = 9
SCORE_BYTES = 13  # per score where attention keeps them: product, softmax with mask, dropout and its mask, product
INTERLEAVED = 0.5  # the share of a send that is exposed where the rank has another stage's work to do
SIXTEEN_BITS = 2  # bytes of an element, for which the work of a layer is counted (products.py)
NODE = 8  # devices; the jitter counts doublings from there on


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by part. `exposed`: messages that are not hidden behind computation, by axis."""

    compute: float
    exposed: dict[str, float]
    bubble: float
    optimiser: float
    other: float
    tokens: int
    devices: int

    @property
    def total(self) -> float:
        return self.compute + sum(self.exposed.values()) + self.bubble + self.optimiser + self.other

    @property
    def tokens_per_s_per_device(self) -> float:
        return self.tokens / self.total / self.devices


@dataclass
class StageTime:
    """Seconds of one stage's microbatch, and of what it does once a step."""

    forward: float
    backward: float
    exposed: dict[str, float] = field(default_factory=dict)
    once: dict[str, float] = field(default_factory=dict)

    @property
    def microbatch(self) -> float:
        return self.forward + self.backward + sum(self.exposed.values())


# The seconds in which a pipeline's slowest rank waits, from the times of all ranks of `pp` in their order.
Bubble = Callable[[Quantities, list[StageTime]], float]


def closed_bubble(q: Quantities, order: list[StageTime]) -> float:
    """The other ranks once, divided by the chunks of a rank."""
    each = [one.microbatch for one in order]
    return (sum(each) - max(each)) / q.chunks * q.job.bubble_share


def step_time(q: Quantities, c: Constants, bubble_of: Bubble = closed_bubble, net: Network | None = None) -> StepTime:
    """`net`: None for the network of the hardware file."""
    plan, hardware = q.job.plan, q.job.plan.config.hardware
    net, m = net or network(hardware, c), q.microbatches
    layer = layer_time(q, c)
    times = [stage_time(q, stage, layer, net, c) for stage in q.kinds]
    order = [times[kind] for kind in q.places]
    slowest = max(times, key=lambda one: one.microbatch)
    bubble = bubble_of(q, order)
    exposed = {axis: m * seconds for axis, seconds in slowest.exposed.items()}
    for axis in dict.fromkeys(axis for one in times for axis in one.once):  # in an order that is always the same
        exposed[axis] = exposed.get(axis, 0.0) + max(one.once.get(axis, 0.0) for one in times)
    compute = m * (slowest.forward + slowest.backward)
    updated = max(stage.updated_bytes for stage in q.kinds)
    optimiser = ADAM_BYTES * updated / optimiser_rate(q, updated)
    steady = compute + sum(exposed.values()) + bubble + optimiser + c.step_ms / 1e3
    jitter = steady * c.jitter * math.log2(max(plan.world_size / NODE, 1))
    tokens = tokens_per_step(plan)
    return StepTime(compute, exposed, bubble, optimiser, c.step_ms / 1e3 + jitter, tokens, plan.world_size)


def optimiser_rate(q: Quantities, size: float) -> float:
    """Bytes/s of the optimiser for `size` bytes of float32 parameters: as it was measured, else the memory's."""
    profile, published = q.profile, q.job.plan.config.hardware.memory_gb_per_s
    rate = profile.optimiser_rate(size) if profile else None
    if rate is None and published is None and profile:
        return profile.copy_rate(size)
    return (published or math.inf) * 1e9 if rate is None else rate


def rates(q: Quantities, c: Constants) -> tuple[float, ...]:
    """FLOP/s of the layers' products, and of those in attention and of the head."""
    others = "bf16" if q.job.products in LOW_PRECISION else q.job.products
    return tuple(c.sustained * 1e12 * q.job.rate_of(name) for name in (q.job.products, others))


def layer_time(q: Quantities, c: Constants) -> tuple[Direction, Direction]:
    """Forward and backward of one layer of one microbatch, without messages and recomputation."""
    if q.profile is not None:
        return measured.layer_time(q, q.profile)
    hardware, work = q.job.plan.config.hardware, q.work
    assert hardware.memory_gb_per_s is not None and hardware.exp_tera_per_s is not None
    rate, other_rate = rates(q, c)
    memory, tail = hardware.memory_gb_per_s * 1e9, c.tail * q.tile_elements
    if work.fused:
        attention = work.attention_flops / (other_rate * c.attention_products)
        attention += work.scores * c.exp_cost / (hardware.exp_tera_per_s * 1e12)
        back = 2.5 * attention  # five products for two (FlashAttention, Dao et al. 2022)
    else:
        attention = work.attention_flops / other_rate + work.scores * SCORE_BYTES / memory
        back = 2 * attention
    _, used = element_sizes(q.job.plan.config.precision)
    elementwise = c.passes * work.bytes * used / SIXTEEN_BITS / memory
    launch = c.layer_us * US
    if q.units:
        launch += c.unit_us * US
    return (
        Direction(work.forward.seconds(rate, tail, c.depth_cost), attention, elementwise, launch / 3),
        Direction(work.backward.seconds(rate, tail, c.depth_cost), back, 2 * elementwise, launch * 2 / 3),
    )


def stage_time(
    q: Quantities, stage: Stage, layer: tuple[Direction, Direction], net: Network, c: Constants
) -> StageTime:
    forward, backward = layer[0].total * stage.layers, layer[1].total * stage.layers
    kind = recomputation(q.job.plan)
    if kind is ActivationCheckpointing.full:
        backward += forward
    elif kind is ActivationCheckpointing.selective:
        backward += layer[0].elementwise * stage.layers
    if stage.has_head:
        forward, backward = forward + head_time(q, c, 0), backward + head_time(q, c, 1)
    attention = (layer[0].attention + layer[1].attention) * stage.layers
    found = StageTime(forward, backward)
    gathered = collide = 0.0
    axes: set[str] = set()  # over which FSDP gathers and reduces
    for message in stage.messages:
        seconds, cost = message_seconds(message, q, net), overlap_cost(message, q, c)
        if message.per_step:
            hidden = 0.0 if q.job.reduces_late else backward / q.chunks
            found.once[message.axis] = found.once.get(message.axis, 0.0) + behind(seconds, hidden, cost)
        elif message.of_data:
            axes.add(message.axis)
            gathered += seconds / q.microbatches
            collide += cost * seconds / q.microbatches
        else:
            each = exposed_of(message, seconds / q.microbatches, attention, q, c)
            found.exposed[message.axis] = found.exposed.get(message.axis, 0.0) + each
    if gathered:
        part = "dp" if axes - {"cp"} else "cp"
        exposed = behind(gathered, forward + backward, collide / gathered)
        found.exposed[part] = found.exposed.get(part, 0.0) + exposed
    return found


def message_seconds(message: Message, q: Quantities, net: Network) -> float:
    """The time of all calls of a message in a step: as measured between as many ranks, else by the data sheet."""
    if (known := net.known(message)) is not None:
        return known
    profile, calls = q.profile, message.calls
    if profile is not None and calls and message.group.domains == 1:
        precision = "float32" if message.of_data and message.op != "all_gather" else profile.precision
        for op in (*own_table(message, q), message.op):
            each = profile.message_seconds(op, message.group.size, message.bytes / calls, precision)
            if each is not None:
                return calls * each
    return net.seconds(message.op, calls, message.bytes, message.group)


def own_table(message: Message, q: Quantities) -> tuple[str, ...]:
    """The table in which a profile has gathers and reduce-scatters of activations, with the copies that they need."""
    plan = q.job.plan
    if message.of_data or message.axis not in ("tp", "cp"):
        return ()
    dim = token_dim(plan.config.train.micro_batch_size, plan.degrees["tp"]) if message.axis == "tp" else 1
    return tuple(name for name, place in OF_ACTIVATIONS.items() if place == (message.op, dim))


def overlap_cost(message: Message, q: Quantities, c: Constants) -> float:
    cost = q.profile.overlap_cost(message.op, message.group.size) if q.profile else None
    return c.overlap_cost if cost is None else cost


def head_time(q: Quantities, c: Constants, direction: int) -> float:
    if q.profile is not None:
        return measured.head_time(q, q.profile, direction)
    memory = (q.job.plan.config.hardware.memory_gb_per_s or math.inf) * 1e9
    products = q.head[0] if direction == 0 else q.head[1]
    return products.seconds(rates(q, c)[1], c.tail * q.tile_elements, c.depth_cost) + q.head[2] / memory


def exposed_of(message: Message, seconds: float, attention: float, q: Quantities, c: Constants) -> float:
    """What of a message of a microbatch computation does not hide."""
    if message.axis == "pp":
        return seconds * c.send_exposed * (INTERLEAVED if q.chunks > 1 else 1.0)
    if message.axis.startswith("tp") and q.job.async_tp:
        return seconds * c.async_tp_exposed
    if message.axis == "cp" and passes_round(q.job.plan):
        return max(seconds - attention, 0.0)
    return seconds


def behind(message: float, computation: float, cost: float) -> float:
    """The time that a message adds to a computation beside which it runs: what is longer, and what they cost each
    other, as a share of the shorter one."""
    return max(message - computation, 0.0) + cost * min(message, computation)
