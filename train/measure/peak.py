"""What fills the memory of a rank at the peak of a recorded step, by kind, from the events of the allocator.

parameters, gradients, optimiser   known by the addresses of their storages
communication                      allocated while a collective was requested, or by FSDP for tensors that it gathers
activations                        allocated in a forward, and not freed yet
temporary                          allocated elsewhere in the step
untracked                          allocated before the step, and not one of the known tensors (on a GPU). On a CPU it
                                   is unknown, because the allocator does not report what was allocated before the step:
                                   the curve of a CPU starts at the size of the known tensors
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from train.measure.recording import Recording
from train.measure.results import MEMORY_KINDS, MiB
from train.model.spans import Intervals, clip, union
from train.ranks.gradients import local

CURVE_POINTS = 400

Addresses = dict[int, int]  # address of a storage -> its bytes


def storages(tensors: Iterable[Tensor | None], device_type: str) -> Addresses:
    """The storages of the tensors that are on a device of this type, each storage once."""
    own = (local(t).untyped_storage() for t in tensors if t is not None and local(t).device.type == device_type)
    return {storage.data_ptr(): storage.nbytes() for storage in own if storage.nbytes()}


def at_peak(recording: Recording, known: dict[str, Addresses]) -> dict[str, Any]:
    """{"at_peak_mib": {kind: MiB}, "curve": [[ms, MiB], …]} of the memory that was allocated on the recorded device.

    `known`: the parameters and the optimiser state before the step, and the gradients when they were complete.
    """
    born = {e.address for e in recording.allocations if e.bytes > 0}
    kinds = {address: kind for kind, addresses in known.items() for address in addresses}
    # the kind of each allocated block, by address; a gradient that was not allocated in the step existed before it
    kinds = {address: kind for address, kind in kinds.items() if kind != "gradients" or address not in born}
    held = {kind: sum(known[kind][a] for a, k in kinds.items() if k == kind) for kind in MEMORY_KINDS}
    before = recording.allocations[0].total - recording.allocations[0].bytes if recording.allocations else 0
    held["untracked"] = max(before - sum(held.values()), 0) if before > 0 else 0
    forward = union(r.interval for r in recording.regions if r.words[0] == "F")
    asking = union(r.interval for r in recording.regions if r.words[0] in ("comm", "sending"))
    gradients = _that_became_gradients(recording, known["gradients"])
    total = sum(held.values())
    peak, best, curve = total, dict(held), [(0.0, total)]
    for i, event in enumerate(recording.allocations):
        if event.bytes > 0:
            kind = "gradients" if i in gradients else _kind(event.at, forward, asking)
            kinds[event.address] = kind
        else:
            kind = kinds.pop(event.address, "untracked")
            if kind == "untracked" and not event.total:
                continue  # on a CPU, where it was never counted
        held[kind] += event.bytes
        total += event.bytes
        curve.append((event.at, total))
        if total > peak:
            peak, best = total, dict(held)
    return {
        "at_peak_mib": {kind: size / MiB for kind, size in best.items()},
        "curve": [[round(at, 3), size / MiB] for at, size in thinned(curve)],
    }


def _that_became_gradients(recording: Recording, addresses: Addresses) -> set[int]:
    """The indices of the allocations that hold gradients when the update begins."""
    updates = [r.interval[0] for r in recording.regions if r.words[0] == "optimiser"]
    last: dict[int, int] = {}
    for i, event in enumerate(recording.allocations):
        if updates and event.at > max(updates):
            break
        if event.bytes > 0:
            last[event.address] = i
    return {i for address, i in last.items() if address in addresses}


def _kind(at: float, forward: Intervals, asking: Intervals) -> str:
    if clip(asking, at, at):
        return "communication"
    return "activations" if clip(forward, at, at) else "temporary"


def thinned(curve: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """At most CURVE_POINTS of the points: the highest point of each of that many stretches."""
    if len(curve) <= CURVE_POINTS:
        return curve
    stretch = -(-len(curve) // CURVE_POINTS)
    return [max(curve[i : i + stretch], key=lambda point: point[1]) for i in range(0, len(curve), stretch)]
