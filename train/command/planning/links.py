"""The time of collectives by the alpha-beta model: a latency for each call and step, and bytes over a bandwidth.

Ranks are numbered from the innermost axis (tp) outward, so a group's ranks are `stride` apart. Those of one node, or of
one domain of links, talk over the links; nodes talk over their network cards, which all groups of a node share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from train.command.planning.constants import Constants
from train.config.groups.hardware import HardwareConfig
from train.config.plan import Plan
from train.config.strategy import MESH_AXES
from train.config.traffic import degree_of

if TYPE_CHECKING:
    from train.command.planning.quantities import Message

US = 1e-6


@dataclass(frozen=True, slots=True)
class Group:
    """`size` ranks, of which `inside` share a domain of links."""

    size: int
    inside: int

    @property
    def domains(self) -> float:
        return self.size / self.inside


def group_of(plan: Plan, axis: str) -> Group:
    """The group of an axis, or of several joined by dots."""
    size, hardware = degree_of(plan, axis), plan.config.hardware
    domain = hardware.linked_devices or hardware.devices_per_node or plan.world_size
    named = [part for part in axis.split(".") if part in MESH_AXES]
    inner = MESH_AXES[MESH_AXES.index(named[-1]) + 1 :] if named else ()
    if axis.startswith(("ep", "efsdp")):
        inner = ("tp",)
    stride = math.prod(plan.degrees[one] for one in inner) * (plan.ep if axis.startswith("efsdp") else 1)
    return Group(size, max(min(size, domain // min(stride, domain)), 1))


@dataclass(frozen=True)
class Network:
    """The bandwidths and latencies of a device as the constants correct them, in bytes/s and seconds."""

    link: float
    card: float
    call: float
    link_step: float
    node_step: float

    def known(self, message: Message) -> float | None:
        """The time of all calls of a message in a step, where this network knows it better than a profile."""
        return None

    def seconds(self, op: str, calls: int, size: float, group: Group) -> float:
        """The time of `calls` operations over a group with `size` bytes in all, by nccl-tests' convention."""
        n, inside, domains = group.size, group.inside, group.domains
        if op == "send":
            far = domains > 1  # the slowest hop sets the pace
            return calls * (self.call + (self.node_step if far else self.link_step)) + size / (
                self.card if far else self.link
            )
        latency = self.call + math.log2(inside) * self.link_step + math.log2(domains) * self.node_step
        if op == "all_reduce":
            bandwidth = 2 * (inside - 1) / inside * size / self.link
            if domains > 1:
                bandwidth += 2 * (domains - 1) / domains * size / (self.card * inside)
            return calls * latency + bandwidth
        bandwidth = (n - 1) / n * size / self.link if inside > 1 else 0.0
        if domains > 1:
            bandwidth = max(bandwidth, (n - 1) / n * size / (self.card * inside))
        return calls * latency + bandwidth


def network(hardware: HardwareConfig, c: Constants) -> Network:
    """Where a figure is missing, nothing is sent: `job.missing_figures` names it where it is needed."""
    per_node = hardware.devices_per_node or 1
    return Network(
        link=(hardware.link_gb_per_s or math.inf) * 1e9 * c.links,
        card=(hardware.node_gb_per_s or math.inf) * 1e9 / per_node * c.network,
        call=c.call_us * US,
        link_step=(hardware.link_latency_us or 0.0) * US,
        node_step=(hardware.node_latency_us or 0.0) * US,
    )


# What gloo puts on the wire. It has no reduce_scatter of its own: torch makes an all_reduce of the whole tensor and
# keeps a part (torch 2.11 to 2.13).
RINGS = {"all_reduce": 2, "reduce_scatter": 2, "all_gather": 1}  # how often a tensor goes round, but for one part of it
# Between two ranks, gloo asks for what it receives behind what it sends to the same rank, so that a part of the two
# directions comes in turn: of an all_gather's halves one, of an all_to_all everything.
IN_TURN = {"all_gather": 1.5, "all_to_all": 2.0}


def edge_bytes(op: str, ranks: int, size: float) -> float:
    """Bytes over one edge, in one direction. `size`: by nccl-tests' convention, the whole tensor; of a `send`, what one
    rank sends. Of an `all_to_all`, what a rank sends to each of the others."""
    if op == "send" or ranks < 2:
        return float(size)
    if op == "all_to_all":
        return size / ranks
    return RINGS.get(op, 1) * (ranks - 1) / ranks * size


def in_turn(op: str, ranks: int) -> float:
    """How many times as long as on a link that carries both directions at once."""
    return IN_TURN.get(op, 1.0) if ranks == 2 else 1.0
