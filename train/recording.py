"""One recorded step of this rank: torch's profiler's events, sorted into what the lab asks of them.

    with record(device, mesh, named=True) as recorded:
        ...                       # one step, its regions named by `spans.span`
    recorded.take()               # -> Recording

Times are milliseconds from the step's start, on the host's clock for a CPU, on the device's for an accelerator.

A CPU works where an operator runs (gaps under PYTHON_GAP_MS between two are Python's, and work too), unless it is
inside a wait. What gloo does has an event of its own, in a thread of its own; which group and how many bytes says the
region that the ledger puts round the operator. On a GPU work is a kernel, a copy or a fill; NCCL's kernels are
communication, and carry their group, operation and size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from train.collectives import group_named
from train.ledger import axis_of
from train.spans import PREFIX, Interval, Intervals, span, subtract, union

PYTHON_GAP_MS = 0.2
WAITS = ("_c10d_functional::wait_tensor", PREFIX + "wait")
# where buffers of communication are allocated; FSDP's gathered parameters are among them
SENDING = ("FSDP::all_gather", "FSDP::post_backward_reduce", "c10d::", "_c10d_functional::", "strategy_lab::")
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


class Region(NamedTuple):
    """What ran under one `span`. `words`: its name's."""

    words: tuple[str, ...]
    interval: Interval


class Message(NamedTuple):
    """One collective, from where it was asked for (CPU) or began (GPU) to its end. `ran`: in it, the transfer alone.
    A receive is an operation `send` that its sender counts."""

    axis: str
    op: str
    bytes: int
    interval: Interval
    ran: float
    counted: bool = True


class Allocation(NamedTuple):
    """`bytes` are negative where memory is given back. `total`: the allocator's after it; 0 of a CPU."""

    at: float
    address: int
    bytes: int
    total: int


@dataclass
class Recording:
    step_ms: float
    regions: list[Region]
    work: Intervals  # of the device, without communication
    phase_work: dict[str, Intervals] = field(default_factory=dict)  # on a GPU: by the region that launched it
    actions: list[Region] = field(default_factory=list)  # F, B, I, W as the device ran them
    messages: list[Message] = field(default_factory=list)
    in_flight: Intervals = field(default_factory=list)  # something is sent or waited for
    allocations: list[Allocation] = field(default_factory=list)


class Recorder:
    """Around one step; `take` reads what it saw, `export` keeps the profiler's own file."""

    def __init__(self, device: torch.device, mesh: DeviceMesh) -> None:
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if device.type != "cpu":
            kinds.append(getattr(torch.profiler.ProfilerActivity, device.type.upper()))
        self.device, self.mesh = device, mesh
        self.profiler = torch.profiler.profile(
            activities=kinds, record_shapes=True, profile_memory=True, acc_events=True
        )

    def __enter__(self) -> Recorder:
        self.wait = dist.Work.wait
        dist.Work.wait = self._recorded_wait(self.wait)  # type: ignore[method-assign]
        self.profiler.__enter__()
        self.step = span("step")
        self.step.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        self.step.__exit__(*error)
        self.profiler.__exit__(*error)
        dist.Work.wait = self.wait  # type: ignore[method-assign]

    @staticmethod
    def _recorded_wait(wait: Any) -> Any:
        """The profiler sees no wait for a send or a receive; this one it sees."""

        def recorded(work: dist.Work, *args: Any, **kwargs: Any) -> Any:
            with span("wait"):
                return wait(work, *args, **kwargs)

        return recorded

    def take(self, keep: Path | None = None) -> Recording:
        """`keep`: where the profiler's file stays (.json or .json.gz, for chrome://tracing or Perfetto)."""
        with TemporaryDirectory() as folder:
            path = Path(folder) / "events.json"
            self.profiler.export_chrome_trace(str(path))
            text = path.read_text()
        if keep is not None:
            import gzip

            keep.parent.mkdir(parents=True, exist_ok=True)
            with gzip.open(keep, "wt", compresslevel=3) as file:
                file.write(text)
        events = [event for event in json.loads(text)["traceEvents"] if "ts" in event]
        return read(events, self.device.type, self.mesh)


def read(events: list[dict[str, Any]], device_type: str, mesh: DeviceMesh | None) -> Recording:
    """The events of a Chrome trace, of a step under the region `lab:step`. `mesh` names groups of NCCL's kernels."""
    (step,) = (event for event in events if event["name"] == PREFIX + "step" and event["cat"] == "user_annotation")
    start, end = step["ts"], step["ts"] + step["dur"]
    inside = [event for event in events if start <= event["ts"] <= end]
    timed = [(event, _interval(event, start)) for event in inside if event["ph"] == "X"]
    regions = [
        Region(tuple(event["name"].removeprefix(PREFIX).split()), interval)
        for event, interval in timed
        if event["cat"] == "user_annotation" and event["name"].startswith(PREFIX)
    ]
    regions += [Region(("sending",), interval) for event, interval in timed if event["name"].startswith(SENDING)]
    kind = 0 if device_type == "cpu" else 1
    allocations = sorted(
        Allocation((e["ts"] - start) / 1e3, a["Addr"], a["Bytes"], kind * a["Total Allocated"])
        for e in inside
        if e["name"] == "[memory]" and (a := e["args"])["Device Type"] == kind
    )
    recording = Recording(step["dur"] / 1e3, regions, [], allocations=allocations)
    (_read_cpu if device_type == "cpu" else _read_device)(recording, timed, mesh)
    return recording


def _interval(event: dict[str, Any], start: float) -> Interval:
    return (event["ts"] - start) / 1e3, (event["ts"] + event["dur"] - start) / 1e3


Timed = list[tuple[dict[str, Any], Interval]]


def _read_cpu(recording: Recording, timed: Timed, mesh: DeviceMesh | None) -> None:
    transfers = sorted((i, e["name"].removeprefix("gloo:")) for e, i in timed if e["name"].startswith("gloo:"))
    waits = union(i for e, i in timed if e["name"] in WAITS)
    operators = union(
        (i for e, i in timed if e["cat"] == "cpu_op" and not e["name"].startswith("c10d::")), gap=PYTHON_GAP_MS
    )
    recording.work = subtract(operators, waits)
    recording.actions = [region for region in recording.regions if region.words[0] in "FBIW"]
    asked = sorted((r for r in recording.regions if r.words[0] == "comm"), key=lambda r: r.interval)
    recording.messages = list(_matched(asked, transfers))
    asking = (i for e, i in timed if e["name"].startswith("c10d::"))
    recording.in_flight = union([*waits, *(i for i, _ in transfers), *(r.interval for r in asked), *asking])


def _matched(asked: list[Region], transfers: list[tuple[Interval, str]]) -> Iterator[Message]:
    """Each region that asked for a collective with gloo's event of it: the first that begins after it was asked for.
    The ledger has no region for a receive: those are on the axis of the sends, as all are of one pipeline."""
    sends = [interval for interval, name in transfers if name == "send"]
    others = [interval for interval, name in transfers if name not in ("send", "recv")]
    for (_, axis, op, num_bytes), (start, end) in asked:
        rest, ran = sends if op == "send" else others, 0.0
        found = next((i for i, transfer in enumerate(rest) if transfer[0] >= start), None)
        if found is not None:
            began, ended = rest.pop(found)
            end, ran = max(end, ended), ended - began
        yield Message(axis, op, int(num_bytes), (start, end), ran)
    sending = next((r.words[1] for r in asked if r.words[2] == "send"), "pp")
    for interval, name in transfers:
        if name == "recv":
            yield Message(sending, "send", 0, interval, 0.0, counted=False)


def _read_device(recording: Recording, timed: Timed, mesh: DeviceMesh | None) -> None:
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
    recording.actions.sort(key=lambda r: r.interval)


class _Axes(dict[str, str]):
    """Mesh axes by the name of a process group."""

    def __init__(self, mesh: DeviceMesh | None) -> None:
        super().__init__()
        self.mesh = mesh

    def __missing__(self, group: str) -> str:
        self[group] = axis_of(group_named(group), self.mesh) if self.mesh is not None else group
        return self[group]


def _nccl_message(args: dict[str, Any], interval: Interval, axes: _Axes, sending: str) -> Message:
    """Of a kernel. One that says nothing of itself is a batch of sends and receives, which the host's events count."""
    ran = interval[1] - interval[0]
    if "Collective name" not in args:
        return Message(sending, "send", 0, interval, ran, counted=False)
    op = NCCL_OPS.get(args["Collective name"], args["Collective name"])
    return Message(axes[args["Process Group Name"]], op, _nccl_bytes(args), interval, ran, counted=op != "send")


def _nccl_send(args: dict[str, Any], interval: Interval, axes: _Axes) -> Message:
    """Of the host's request: its bytes, no time. A receive is counted by its sender."""
    at, sent = interval[0], args["Collective name"] == "send"
    num_bytes = _nccl_bytes(args) if sent else 0
    return Message(axes[args["Process Group Name"]], "send", num_bytes, (at, at), 0.0, counted=sent)


def _nccl_bytes(args: dict[str, Any]) -> int:
    return max(args["In msg nelems"], args["Out msg nelems"]) * ELEMENT_BYTES.get(args["dtype"], 0)
