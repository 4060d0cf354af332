"""Messages between ranks: every collective over sizes and group sizes, and what products beside it cost.

All groups of one size send at the same time, as they do in training. Sizes follow nccl-tests' convention: the whole
tensor, which all_gather has afterwards, and reduce_scatter before.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate

import torch
import torch.distributed as dist

from scripts.calibrating.compute import Call, Row, compute_dtype
from scripts.calibrating.timing import Run, Stopwatch
from train.ranks import collectives
from train.ranks.collectives import GATHER, SCATTER

SIZES, GPU_SIZES = [4**i for i in range(6, 14)], [4**i for i in range(6, 15)]  # bytes, from 4 KiB
BESIDE, GPU_BESIDE = 2**24, 2**28  # bytes of the message that is sent beside products
WIDTH = 64  # of activations [sequences, tokens, width]
BESIDE_OPS = ("all_reduce", "reduce_scatter", "all_gather")  # those that run beside the computation


class Groups:
    """Groups of neighbouring ranks by size: powers of two, and the whole world. Collective."""

    def __init__(self, world_size: int, rank: int) -> None:
        self.own: dict[int, dist.ProcessGroup] = {}
        sizes = {2**i for i in range(1, 16) if world_size % 2**i == 0} | ({world_size} if world_size > 1 else set())
        for size in sorted(sizes):
            for start in range(0, world_size, size):
                group = dist.new_group([*range(start, start + size)])
                if start <= rank < start + size:
                    self.own[size] = group


def message_rows(
    watch: Stopwatch, groups: Groups, op: str, precision: str, sizes: Sequence[int] | None = None, late_s: float = 0.0
) -> Iterator[Row]:
    """[ranks, bytes, microseconds] of one collective, from the slowest rank. `sizes`: None for those of a profile.

    `late_s`: how many seconds the last rank of each group comes behind the others, each time. It alone is timed then,
    as the others wait for it first.
    """
    dtype = compute_dtype(precision)
    for ranks, group in groups.own.items():
        found = []
        is_timed = not late_s or dist.get_rank(group) == ranks - 1
        before = [partial(time.sleep, late_s)] if late_s and is_timed else []
        for size in sizes or (SIZES if watch.device.type == "cpu" else GPU_SIZES):
            name = f"{op} of {size} bytes over {ranks} ranks, {precision}"
            elements = max(size // dtype.itemsize // ranks, 1) * ranks
            run = _runs(elements, dtype, watch.device, group)[op]
            spans = watch.spans(name, [*before, run])
            if spans is not None:
                seconds = watch.slowest(spans[-1] if is_timed else 0.0)
                found.append([ranks, elements * dtype.itemsize, seconds * 1e6])
        yield from _rising(found)


def activation_rows(watch: Stopwatch, groups: Groups, op: str, dim: int, call: Call, precision: str) -> Iterator[Row]:
    """[ranks, bytes, microseconds] of an `all_gather` or `reduce_scatter` of activations along `dim`, as `tp` and `cp`
    call them, from the slowest rank. On gloo they are an all-to-all, and along the sequence (1) they copy too.

    A product runs before each, because ranks that compute meet less exactly than ranks that only talk.
    """
    dtype, product = compute_dtype(precision), call.run(compute_dtype(precision), watch.device)
    for ranks, group in groups.own.items():
        rows = []
        for size in SIZES if watch.device.type == "cpu" else GPU_SIZES:
            tokens = max(size // dtype.itemsize // WIDTH // ranks, 1) * ranks
            shape = [1, 1, WIDTH]
            shape[dim] = tokens // ranks if op == "all_gather" else tokens
            x = torch.zeros(shape, dtype=dtype, device=watch.device)
            run = partial(getattr(collectives, op), x, dim, group)
            name = f"{op} of activations of {size} bytes along {dim} over {ranks} ranks, {precision}"
            found = watch.spans(name, [product, run])
            if found is not None:
                rows.append([ranks, tokens * WIDTH * dtype.itemsize, watch.slowest(found[1]) * 1e6])
        yield from _rising(rows)


def _rising(rows: list[Row]) -> list[Row]:
    """The rows of one operation by size, none of which takes longer than a larger one: that would be a disturbance."""
    times = [*accumulate((row[-1] for row in reversed(rows)), min)]
    return [[*row[:-1], time] for row, time in zip(rows, reversed(times), strict=True)]


def _runs(
    elements: int, dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup, *, later: bool = False
) -> dict[str, Run]:
    """A message of each kind. `later`: the collectives return at once with their `Work`."""
    ranks, rank = group.size(), dist.get_rank(group)
    whole = torch.zeros(elements, dtype=dtype, device=device)
    other, part = torch.zeros_like(whole), torch.zeros(elements // ranks, dtype=dtype, device=device)

    def shift() -> None:
        """Send to the next rank, and receive from the one before, as a pipeline and a ring do."""
        # gloo asks for what it receives behind what it sends to the same rank, so the order decides on two ranks
        ops = [
            dist.P2POp(dist.irecv, other, group=group, group_peer=(rank - 1) % ranks),
            dist.P2POp(dist.isend, whole, group=group, group_peer=(rank + 1) % ranks),
        ]
        for work in dist.batch_isend_irecv(ops):
            work.wait()

    return {
        "all_reduce": lambda: dist.all_reduce(whole, group=group, async_op=later),
        "reduce_scatter": lambda: SCATTER(part, whole, group=group, async_op=later),
        "all_gather": lambda: GATHER(whole, part, group=group, async_op=later),
        "all_to_all": lambda: dist.all_to_all_single(other, whole, group=group, async_op=later),
        "send": shift,
    }


def overlap_rows(watch: Stopwatch, groups: Groups, op: str, call: Call, precision: str) -> Iterator[Row]:
    """[ranks, cost]: (time of a message and products together - the longer of both alone) / the shorter.

    DDP's all-reduces are asynchronous on every device. FSDP's messages run on a stream of their own, which a CPU does
    not have: there they are waited for at once, so that they hide nothing and the cost is 1.
    """
    on_cpu = watch.device.type == "cpu"
    if on_cpu and op != "all_reduce":
        yield from ([ranks, 1.0] for ranks in groups.own)
        return
    product = call.run(compute_dtype(precision), watch.device)
    for ranks, group in groups.own.items():
        elements = (BESIDE if on_cpu else GPU_BESIDE) // torch.float32.itemsize // ranks * ranks
        start = _runs(elements, torch.float32, watch.device, group, later=True)[op]
        alone = watch.spans(f"{op} and products, each alone, {ranks} ranks", [_together(start, product, 0), product])
        if alone is None:
            continue
        sent, computed = watch.slowest(alone[0]), watch.slowest(alone[1])
        count = max(round(sent / computed), 1)
        both = watch.seconds(f"{op} and products together, {ranks} ranks", _together(start, product, count))
        if both is not None:
            computed *= count
            yield [ranks, (watch.slowest(both) - max(sent, computed)) / min(sent, computed)]


def _together(start: Run, product: Run, count: int) -> Run:
    """A message, with so many products beside it."""

    def run() -> None:
        work = start()
        for _ in range(count):
            product()
        if isinstance(work, dist.Work):
            work.wait()

    return run
