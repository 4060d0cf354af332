"""One recorded step of this rank: the events of torch's profiler, sorted by what they mean.

    with Recorder(device, mesh) as recorder:
        ...                        # one step, whose regions are named by `spans.span`
    recorder.recording()           # -> Recording

Times are milliseconds since the start of the step, by the host's clock for a CPU and by the device's clock for an
accelerator.

A CPU works while an operator runs, except inside a wait. Gaps under PYTHON_GAP_MS between two operators are Python
code, and count as work too. Each transfer of gloo has its own event, in gloo's thread. Its group and bytes are known
from the region that the ledger puts around the operator. recording_gpu.py reads the events of a GPU.
"""

from __future__ import annotations

import gc
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from train.model.spans import PREFIX, Interval, Intervals, span, subtract, union

PYTHON_GAP_MS = 0.2
WAITS = ("_c10d_functional::wait_tensor", PREFIX + "wait")
# regions in which communication buffers are allocated, among them the parameters that FSDP gathers
SENDING = ("FSDP::all_gather", "FSDP::post_backward_reduce", "c10d::", "_c10d_functional::", "strategy_lab::")


class Region(NamedTuple):
    """What ran under one `span`. `words` are the words of its name."""

    words: tuple[str, ...]
    interval: Interval


class Message(NamedTuple):
    """One collective, from its request (CPU) or its start (GPU) to its end. `ran`: the ms of the transfer alone. A
    receive is a `send` here, with `counted=False`, because its sender counts it."""

    axis: str
    op: str
    bytes: int
    interval: Interval
    ran: float
    counted: bool = True


class Allocation(NamedTuple):
    """`bytes` is negative when memory is freed. `total`: the allocator's total after it; 0 on a CPU."""

    at: float
    address: int
    bytes: int
    total: int


@dataclass
class Recording:
    step_ms: float
    regions: list[Region]
    work: Intervals  # when the device works, communication not included
    phase_work: dict[str, Intervals] = field(default_factory=dict)  # on a GPU: work by the region that launched it
    actions: list[Region] = field(default_factory=list)  # F, B, I, W at the times when the device ran them
    messages: list[Message] = field(default_factory=list)
    in_flight: Intervals = field(default_factory=list)  # when a message is sent or awaited
    allocations: list[Allocation] = field(default_factory=list)


class Recorder:
    """Records one step, inside its `with` block. Afterwards `recording` returns what it saw."""

    def __init__(self, device: torch.device, mesh: DeviceMesh) -> None:
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if device.type != "cpu":
            kinds.append(getattr(torch.profiler.ProfilerActivity, device.type.upper()))
        self.device, self.mesh = device, mesh
        # record_shapes adds the description of NCCL's kernels; without it, the events of a CPU are read faster
        self.profiler = torch.profiler.profile(
            activities=kinds, record_shapes=device.type != "cpu", profile_memory=True
        )

    def __enter__(self) -> Recorder:
        self.wait = dist.Work.wait
        dist.Work.wait = self._recorded_wait(self.wait)  # type: ignore[method-assign]
        with warnings.catch_warnings():  # it warns that a second recording clears the first, which is not needed
            warnings.filterwarnings("ignore", ".*Profiler clears events")
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
        """The profiler does not see a wait for a send or a receive, so this wait adds a region."""

        def recorded(work: dist.Work, *args: Any, **kwargs: Any) -> Any:
            with span("wait"):
                return wait(work, *args, **kwargs)

        return recorded

    def recording(self, keep: Path | None = None) -> Recording:
        """`keep`: a file for the profiler's trace (.json.gz, for chrome://tracing or Perfetto)."""
        with TemporaryDirectory() as folder:
            path = Path(folder) / "events.json"
            self.profiler.export_chrome_trace(str(path))
            text = path.read_text()
        if keep is not None:
            import gzip

            keep.parent.mkdir(parents=True, exist_ok=True)
            with gzip.open(keep, "wt", compresslevel=3) as file:
                file.write(text)
        with without_garbage_collection():
            events = [event for event in json.loads(text)["traceEvents"] if "ts" in event]
            return read(events, self.device.type, self.mesh)


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Switches off garbage collection, which would scan a hundred thousand new objects again and again."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def read(events: list[dict[str, Any]], device_type: str, mesh: DeviceMesh | None) -> Recording:
    """Read the events of a Chrome trace whose step is the region `lab:step`. `mesh` names the groups of NCCL."""
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
    if device_type == "cpu":
        _read_cpu(recording, timed)
    else:
        from train.measure.recording_gpu import read_gpu

        read_gpu(recording, timed, mesh)
    return recording


def _interval(event: dict[str, Any], start: float) -> Interval:
    return (event["ts"] - start) / 1e3, (event["ts"] + event["dur"] - start) / 1e3


Timed = list[tuple[dict[str, Any], Interval]]


def _read_cpu(recording: Recording, timed: Timed) -> None:
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
    """Match each region that requested a collective with gloo's event of it: the first one that begins after the
    request. The ledger has no region for a receive. Its axis is that of the sends, because all belong to one pipeline.
    """
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
