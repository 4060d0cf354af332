"""The planner's prediction for an emulated cluster: its cost model, with the links of this cluster for its network.

    a message    its calls x the latency measured on this link + bytes over the busiest edge / the link's payload rate,
                 which is longer where gloo does not send in both directions at once
    computation  from a profile that scripts/matmul.py measured with as many processes at once

What is hidden differs from an accelerator: FSDP's messages are waited for at once; a receiver of a pipeline starts a
message when it needs it; of DDP's buckets the last one, which holds all of a small model, has no backward left beside
it, and sending costs the processor what it costs on an unshaped link.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from launch.emulating.cluster import LO_PAYLOAD, PAYLOAD
from launch.emulating.placement import edges_of, pairs_of
from train.command.planning import constants
from train.command.planning.constants import Constants
from train.command.planning.job import of_plan
from train.command.planning.links import Network, edge_bytes, in_turn
from train.command.planning.profile import OPS
from train.command.planning.quantities import Message, quantities
from train.command.planning.search.replay import Replays
from train.command.planning.step_time import StepTime
from train.config.groups.hardware import HardwareConfig
from train.config.plan import Plan
from train.config.strategy import MESH_AXES
from train.strategies.data.keys import DdpKeys
from train.strategies.memory import state_bytes

MiB = 2**20
# The lab's own gather and reduce-scatter of activations are all-to-alls on gloo (train/ranks/collectives.py).
EXCHANGED, EXCHANGING = ("all_gather", "reduce_scatter"), ("tp", "cp")
Rows = Sequence[Sequence[object]]  # of scripts/calibrating/links.py: operation, ranks, bytes, microseconds


@dataclass(frozen=True)
class Measured:
    """Messages that were measured on the links of a cluster, in seconds by (operation, ranks) and bytes."""

    rows: Mapping[tuple[str, int], Mapping[int, float]]

    @classmethod
    def of(cls, rows: Rows) -> Measured:
        found: dict[tuple[str, int], dict[int, float]] = {}
        for op, ranks, size, microseconds in rows:
            assert isinstance(ranks, int) and isinstance(size, int) and isinstance(microseconds, int | float)
            found.setdefault((str(op), ranks), {})[size] = microseconds / 1e6
        return cls(found)

    def rows_again(self) -> list[tuple[str, int, int, float]]:
        """(Operation, ranks, bytes, microseconds)."""
        return [(op, n, size, 1e6 * s) for (op, n), times in self.rows.items() for size, s in times.items()]

    def latency(self, op: str, ranks: int) -> float:
        """Of the smallest message, in groups of this size or of the nearest that was measured."""
        sizes = [n for name, n in self.rows if name == op]
        if not sizes:
            return 0.0
        times = self.rows[op, min(sizes, key=lambda n: (abs(n - ranks), n))]
        return times[min(times)]

    def in_turn(self, op: str, ranks: int, rate: float, size: float) -> float:
        """How many times as long a message of `size` bytes takes as its bytes need at `rate` bit/s, by the nearest size
        that was measured beside the latency; 1 with more ranks than two, whose neighbours are different ranks. Where
        only the latency was measured, the factor of large messages."""
        times = self.rows.get((op, ranks), {})
        if ranks != 2 or len(times) < 2:
            return in_turn(op, ranks)
        least = min(times)
        near = min(times.keys() - {least}, key=lambda one: abs(math.log(one / max(size, 1.0))))
        seconds = times[near] - times[least]
        return max(seconds * rate / (8 * edge_bytes(op, ranks, near - least)), 1.0)

    def rate(self, op: str, ranks: int) -> float | None:
        """Bit/s of an edge with the largest message; None if none was measured in groups of this size."""
        times = self.rows.get((op, ranks))
        return 8 * edge_bytes(op, ranks, max(times)) / times[max(times)] if times else None


def operation(message: Message) -> str:
    """What gloo runs for it."""
    exchanged = message.op in EXCHANGED and message.axis in EXCHANGING and not message.of_data
    return "all_to_all" if exchanged else message.op


@dataclass(frozen=True)
class Emulated(Network):
    """The links of an emulated cluster. `inter`, `intra`: payload in bit/s. `measured`: on these links."""

    degrees: Mapping[str, int] = field(default_factory=dict)
    hosts: Sequence[int] = ()
    inter: float = float("inf")
    intra: float = float("inf")
    measured: Measured = field(default_factory=lambda: Measured({}))

    def known(self, message: Message) -> float | None:
        ranks = message.group.size
        if ranks < 2 or not message.calls:
            return 0.0
        op, (out, inside) = operation(message), self.loads(message)
        longest = max(8 * out / self.inter, 8 * inside / self.intra)
        alone = len({*self.hosts}) == len(self.hosts)  # so that the messages were measured between hosts
        each = message.bytes / message.calls
        slower = self.measured.in_turn(op, ranks, self.inter, each) if alone else in_turn(op, ranks)
        return message.calls * self.measured.latency(op, ranks) + longest * slower

    def loads(self, message: Message) -> tuple[float, float]:
        """The bytes that a message of a step sends out of the busiest host, and inside the busiest one."""
        axes = [axis for axis in message.axis.split(".") if axis in MESH_AXES] or [*self._folded(message.axis)]
        op = operation(message)
        spread = pairs_of if op == "all_to_all" else edges_of
        options = {"closed": False} if op == "send" else {}
        edges = spread(self.degrees, axes, self.hosts, **options)
        each = edge_bytes(op, message.group.size, message.bytes)
        return edges.out * each, edges.inside * each

    def _folded(self, axis: str) -> tuple[str, ...]:
        """The axes of the mesh over which a group with a name of its own is folded: experts, and parts of tp."""
        return ("tp",) if axis.startswith("kv_") else ("dp_shard", "cp")


@dataclass(frozen=True)
class Prediction:
    """`sent`: the bytes that each axis sends out of the busiest host in a step."""

    time: StepTime
    sent: dict[str, float]
    messages: dict[str, int]  # calls of a step, by axis


def prediction(
    plan: Plan, hardware: HardwareConfig, hosts: Sequence[int], inter: float, intra: float | None,
    measured: Measured, unshaped: Measured,
) -> Prediction:  # fmt: skip
    """`hardware`: a profile of the computation. `inter`, `intra`: rates of links in bit/s. `unshaped`: messages on the
    same hosts without shapers."""
    reached = unshaped.rate("all_reduce", plan.world_size) or float("inf")
    payload = min(inter * PAYLOAD, reached)
    own = dataclasses.replace(
        hardware, measured=_tables(hardware, plan, share=payload / reached), devices_per_node=plan.world_size
    )
    job = of_plan(Plan(dataclasses.replace(plan.config, hardware=own), plan.world_size))
    net = Emulated(
        *(float("inf"), float("inf"), 0.0, 0.0, 0.0),
        degrees=plan.degrees,
        hosts=hosts,
        inter=payload,
        intra=min(float("inf") if intra is None else intra * LO_PAYLOAD, reached),
        measured=measured,
    )
    q = quantities(job)
    sent: dict[str, float] = {}
    calls: dict[str, int] = {}
    for message in max(q.kinds, key=lambda kind: sum(one.bytes for one in kind.messages)).messages:
        sent[message.axis] = sent.get(message.axis, 0.0) + net.loads(message)[0]
        calls[message.axis] = calls.get(message.axis, 0) + message.calls
    return Prediction(Replays().step_time(q, _constants(), net), sent, calls)


def _constants() -> Constants:
    """Those of the cost model, but for what they say of a GPU's network: the receiver of a send waits for it once."""
    return dataclasses.replace(constants.load(), send_exposed=1.0)


def _tables(hardware: HardwareConfig, plan: Plan, share: float) -> dict[str, object]:
    """The profile's tables of computation, and what messages and computation cost each other on these links. `share`:
    of the processor's time that sending takes, as without shapers it takes all of it."""
    computed = {name: rows for name, rows in hardware.measured.items() if not name.startswith((*OPS, "overlap"))}
    strategy, late = plan.config.strategy, 0.0
    if isinstance(strategy, DdpKeys) and strategy.uses_ddp():
        gradients = state_bytes(plan, 0)["gradients"]
        late = min(strategy.bucket_mb * MiB, gradients) / gradients if gradients else 0.0
    costs = {"all_reduce": min(late + share, 1.0), "reduce_scatter": 1.0, "all_gather": 1.0}
    sizes = {plan.world_size, *plan.degrees.values()}
    return computed | {f"overlap_{op}": [[size, cost] for size in sorted(sizes)] for op, cost in costs.items()}
