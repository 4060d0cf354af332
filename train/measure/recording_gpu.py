"""Reads the events of a GPU. Kernels, copies and fills are work. NCCL's kernels are communication; their events name
the group, the operation and the size. A kernel belongs to the region of the host that launched it.
"""

from __future__ import annotations

from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from train.measure.ledger import axis_of
from train.measure.recording import Message, Recording, Region, Timed
from train.model.spans import Interval, Intervals, union
from train.ranks.collectives import group_named

ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
NCCL_OPS = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "_allgather_base": "all_gather",
    "allgather": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "all_to_all": "all_to_all",
    "all_to_allv": "all_to_all",
    "alltoall_base": "all_to_all",
}
ELEMENT_BYTES = {
    "Float": 4,
    "BFloat16": 2,
    "Half": 2,
    "Double": 8,
    "Long": 8,
    "Int": 4,
    "Byte": 1,
    "Bool": 1,
    "Char": 1,
}


def read_gpu(recording: Recording, timed: Timed, mesh: DeviceMesh | None) -> None:
    launched = {e["args"]["correlation"]: i[0] for e, i in timed if "correlation" in e.get("args", {})
                and e["cat"] in ("cuda_runtime", "cuda_driver")}  # fmt: skip
    hosts = sorted((r for r in recording.regions if r.words[0] in ("data", "optimiser", *"FBIW")), key=lambda r: r[1])
    by_region: dict[Region, Intervals] = {}
    work: Intervals = []
    axis_of_group = _Axes(mesh)
    points = [(e["args"], i) for e, i in timed if e.get("args", {}).get("Collective name") in ("send", "recv")]
    recording.messages = [_nccl_send(args, interval, axis_of_group) for args, interval in points]
    sending = next((message.axis for message in recording.messages), "pp")
    for event, interval in timed:
        if event["cat"] not in ON_DEVICE:
            continue
        if event["name"].startswith("ncclDevKernel"):
            recording.messages.append(_nccl_message(event["args"], interval, axis_of_group, sending))
            continue
        work.append(interval)
        at = launched.get(event["args"].get("correlation"))
        if at is not None and (region := next((r for r in hosts if r.interval[0] <= at <= r.interval[1]), None)):
            by_region.setdefault(region, []).append(interval)
    recording.work = union(work)
    recording.in_flight = union(m.interval for m in recording.messages)
    phases: dict[str, Intervals] = {}
    for region, intervals in by_region.items():
        phases.setdefault(region.words[0], []).extend(intervals)
        if region.words[0] in "FBIW":
            spanned = min(a for a, _ in intervals), max(b for _, b in intervals)
            recording.actions.append(Region(region.words, spanned))
    recording.phase_work = {name: union(intervals) for name, intervals in phases.items()}


class _Axes(dict[str, str]):
    """The mesh axes of a process group, by its name."""

    def __init__(self, mesh: DeviceMesh | None) -> None:
        super().__init__()
        self.mesh = mesh

    def __missing__(self, group: str) -> str:
        self[group] = axis_of(group_named(group), self.mesh) if self.mesh is not None else group
        return self[group]


def _nccl_message(args: dict[str, Any], interval: Interval, axes: _Axes, sending: str) -> Message:
    """The message of a kernel. A kernel without a description is a batch of sends and receives, whose bytes are counted
    by the events of the host."""
    ran = interval[1] - interval[0]
    if "Collective name" not in args:
        return Message(sending, "send", 0, interval, ran, counted=False)
    op = NCCL_OPS.get(args["Collective name"], args["Collective name"])
    return Message(axes[args["Process Group Name"]], op, _nccl_bytes(args), interval, ran, counted=op != "send")


def _nccl_send(args: dict[str, Any], interval: Interval, axes: _Axes) -> Message:
    """The message of a request by the host: it has bytes, but no time. A receive is counted by its sender."""
    at, sent = interval[0], args["Collective name"] == "send"
    num_bytes = _nccl_bytes(args) if sent else 0
    return Message(axes[args["Process Group Name"]], "send", num_bytes, (at, at), 0.0, counted=sent)


def _nccl_bytes(args: dict[str, Any]) -> int:
    return max(args["In msg nelems"], args["Out msg nelems"]) * ELEMENT_BYTES.get(args["dtype"], 0)
