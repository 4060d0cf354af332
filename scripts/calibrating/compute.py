"""Matrix products, as the model calls them and square ones, and copies of memory.

Rows have the columns of train/command/planning/profile.py. Every rank measures the same at the same time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional as F

from scripts.calibrating.timing import Run, Stopwatch
from train.command.planning import products
from train.config.plan import Plan
from train.config.schema import Precision
from train.config.traffic import tokens_of
from train.model.transformer import dtypes
from train.strategies.techniques import rank_of

Row = list[float]
SQUARES, GPU_SQUARES = (256, 512, 1024, 2048), (512, 1024, 2048, 4096, 8192)
FP8_ALIGNED = 16  # elements
COPIES, GPU_COPIES = (2**20, 2**24, 2**27), (2**20, 2**24, 2**28, 2**30)


@dataclass(frozen=True)
class Call:
    """A matrix product as a layer calls it. `kind`: forward, input (the gradient of the input) or weight."""

    kind: str
    rows: int
    columns: int
    depth: int

    @property
    def takes_fp8(self) -> bool:
        """Whether the kernel for 8-bit numbers accepts these sizes."""
        return self.columns % FP8_ALIGNED == self.depth % FP8_ALIGNED == 0

    def run(self, dtype: torch.dtype, device: torch.device) -> Run:
        """The operands have the layouts that autograd gives them."""
        if self.kind == "weight":
            left = torch.randn(self.depth, self.rows, dtype=dtype, device=device)
            right = torch.randn(self.depth, self.columns, dtype=dtype, device=device)
            return lambda: left.t() @ right
        left = torch.randn(self.rows, self.depth, dtype=dtype, device=device)
        if self.kind == "input":
            right = torch.randn(self.depth, self.columns, dtype=dtype, device=device)
            return lambda: left @ right
        right = torch.randn(self.columns, self.depth, dtype=dtype, device=device)
        return lambda: F.linear(left, right)

    def scaled_run(self, device: torch.device) -> Run:
        """The same product of 8-bit numbers with one scale for each operand, as fp8 training computes it."""
        one = torch.ones((), device=device)
        left = torch.randn(self.rows, self.depth, device=device).to(torch.float8_e4m3fn)
        right = torch.randn(self.columns, self.depth, device=device).to(torch.float8_e4m3fn)
        return lambda: torch._scaled_mm(left, right.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)


def model_calls(plans: Iterable[Plan]) -> list[Call]:
    """The products of a layer and of the head on one rank of each plan, forward and backward, each once."""
    found: dict[Call, None] = {}
    for plan in plans:
        rank = rank_of(plan, plan.world_size - 1)
        for matrix in (*products.layer(rank).matrices, products.head_matrix(rank)):
            for kind, call in zip(
                ("forward", "input", "weight"), products.calls_of(*matrix, tokens_of(plan)), strict=True
            ):
                found[Call(kind, *(max(round(size), 1) for size in call))] = None
    return [*found]


def squares(device: torch.device) -> list[Call]:
    sizes = SQUARES if device.type == "cpu" else GPU_SQUARES
    return [Call("forward", size, size, size) for size in sizes]


def product_rows(watch: Stopwatch, calls: Iterable[Call], precision: str) -> list[Row]:
    """[rows, columns, depth, TFLOP/s] of each product; two products of the same sizes share a row."""
    found: dict[tuple[int, int, int], list[float]] = {}
    fp8 = precision == "fp8"
    for call in calls:
        if fp8 and not call.takes_fp8:
            continue
        name = f"product {precision} {call.rows} x {call.columns} x {call.depth} ({call.kind})"
        run = call.scaled_run(watch.device) if fp8 else call.run(compute_dtype(precision), watch.device)
        seconds = watch.seconds(name, run)
        if seconds is not None:
            found.setdefault((call.rows, call.columns, call.depth), []).append(watch.mean(seconds))
    return [
        [*sizes, 2.0 * sizes[0] * sizes[1] * sizes[2] * len(times) / sum(times) / 1e12]
        for sizes, times in found.items()
    ]


def compute_dtype(precision: str) -> torch.dtype:
    return dtypes(Precision[precision])["compute_dtype"]


def copy_rows(watch: Stopwatch) -> Iterator[Row]:
    """[bytes read and written, GB/s] of a copy inside the device's memory."""
    for size in COPIES if watch.device.type == "cpu" else GPU_COPIES:
        source = torch.empty(size, dtype=torch.uint8, device=watch.device).fill_(1)
        target = torch.empty_like(source)
        seconds = watch.seconds(f"copy of {size} bytes", partial(target.copy_, source))
        if seconds is not None:
            yield [2 * size, 2 * size / watch.mean(seconds) / 1e9]
