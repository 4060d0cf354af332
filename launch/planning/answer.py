"""The answer of `launch.plan`, as lines and as values for programs."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.planning.figures import Costs, Figures, figures, left_out
from train.command.planning.auto import in_place
from train.command.planning.intervals import Interval, interval_of, regime_of
from train.command.planning.search.pricer import Priced
from train.command.planning.search.search import Outcome
from train.command.planning.search.words import parts, shown, why_slower
from train.command.validate import findings
from train.config.plan import Plan
from train.config.schema import Precision
from train.strategies.memory import GiB

LAB = ("float64", "float32", "bf16")  # precisions in which the lab trains every layout


@dataclass(frozen=True)
class Answer:
    """`base`: the plan without a layout. `outcomes`: by precision of the matrix products. `best`: of all of them, the
    fastest first."""

    base: Plan
    outcomes: Mapping[str, Outcome]
    best: tuple[Priced, ...]
    intervals: Mapping[str, Interval]
    tokens: float
    price: float | None
    seconds: float
    top: int
    typed: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def shown(self) -> list[tuple[Priced, Figures]]:
        return [(one, figures(one, self.intervals, self.tokens, self.price)) for one in self.best[: self.top]]

    @property
    def ties(self) -> list[int]:
        """The ranks of the shown layouts whose interval overlaps with that of the first."""
        (_, first), *others = self.shown
        return [place for place, (_, one) in enumerate(others, start=2) if one.high >= first.low]


def lines(answer: Answer) -> list[str]:
    base, train, shown_ones = answer.base, answer.base.config.train, answer.shown
    config, hardware = base.config, base.config.hardware
    batch = f"{train.global_batch_size:,} sequences of {train.seq_len:,} tokens a step"
    result = [f"{config.model.name} on {base.world_size:,} x {hardware.name}, {batch}, {', '.join(answer.outcomes)}"]
    result += answer.notes
    result += [_counted(name, outcome) for name, outcome in answer.outcomes.items()]
    result[-1] += f" ({answer.seconds:.1f} s)"
    result += ["", *_speeds(shown_ones), "", *_times(shown_ones), "", *_memory(shown_ones, hardware.memory_gib)]
    result += ["", *_training(shown_ones), "", *_verdict(answer)]
    if missing := left_out(config, next(iter(answer.outcomes)), answer.price):
        result.append(f"left out, as hardware={hardware.name} lacks the figure: {', '.join(missing)}")
    return [*result, "", "to train with the first:", f"  {command(answer)}"]


def command(answer: Answer) -> str:
    """The command line that trains with the first layout."""
    world_size, first = answer.base.world_size, answer.best[0]
    products, most = first.quantities.job.products, answer.base.config.hardware.devices_per_node or world_size
    nodes = next(n for n in range(-(-world_size // most), world_size + 1) if world_size % n == 0)
    start = ["python", "-m", "launch.local", f"nproc={world_size}"]
    if nodes > 1:
        start = ["torchrun", f"--nnodes={nodes}", f"--nproc_per_node={world_size // nodes}", "train/main.py"]
    note = "" if trains_in(products, first) else f"  (the lab does not train this layout in {products})"
    return shlex.join([*start, *words_of(answer, first)]) + note


def words_of(answer: Answer, one: Priced) -> list[str]:
    """The overrides that train with a layout, without what only the planner reads."""
    products = one.quantities.job.products
    others = [word for word in answer.typed if not word.startswith(("precision=", "hardware="))]
    return [*in_place(others, one.layout.words), *([f"precision={products}"] if trains_in(products, one) else [])]


def trains_in(products: str, one: Priced) -> bool:
    """Whether the lab can train the layout with matrix products of this precision."""
    if products in LAB or products not in {precision.value for precision in Precision}:
        return products in LAB
    plan = one.quantities.job.plan
    ranges, found = findings(Plan(dataclasses.replace(plan.config, precision=Precision(products)), plan.world_size))
    return not ranges and not found


def _counted(name: str, outcome: Outcome) -> str:
    early = outcome.valid - outcome.priced - sum(outcome.unknown.values())
    text = f"{name}: {outcome.valid:,} valid layouts; {early:,} left out by a bound, {outcome.priced:,} priced, "
    text += f"the best {len(outcome.best):,} replayed"
    unknown = [f"{count:,} lack {name}" for name, count in outcome.unknown.items()]
    return "; ".join([text, *unknown])


def _speeds(ones: Sequence[tuple[Priced, Figures]]) -> list[str]:
    rows = [["", "layout", "products", "tokens/s", "80 % interval", "step ms", "MFU %", "sent GiB"]]
    for place, (one, found) in enumerate(ones, start=1):
        mfu = "-" if found.mfu_pct is None else f"{found.mfu_pct:.1f}"
        interval = f"{found.low:,.0f} - {found.high:,.0f}"
        speed = [f"{found.tokens_per_s:,.0f}", interval, f"{found.step_ms:,.1f}", mfu, f"{found.sent_bytes / GiB:.3g}"]
        rows.append([str(place), shown(one.layout), one.quantities.job.products, *speed])
    return aligned(rows, left=(1, 2))


def _times(ones: Sequence[tuple[Priced, Figures]]) -> list[str]:
    """Milliseconds of a step by part."""
    names = list(dict.fromkeys(name for one, _ in ones for name, seconds in parts(one).items() if seconds))
    rows = [["ms", *names]]
    for place, (one, _) in enumerate(ones, start=1):
        rows.append([str(place), *(f"{1e3 * parts(one).get(name, 0.0):,.1f}" for name in names)])
    return aligned(rows)


def _memory(ones: Sequence[tuple[Priced, Figures]], capacity: float | None) -> list[str]:
    """GiB of the fullest rank by kind."""
    names = list(dict.fromkeys(name for one, _ in ones for name in one.footprint.kinds))
    rows = [["GiB", *names, "kept free", "together"]]
    for place, (one, _) in enumerate(ones, start=1):
        kinds = [one.footprint.kinds.get(name, 0.0) for name in names]
        sizes = [*kinds, one.reserve, one.footprint.total + one.reserve]
        rows.append([str(place), *(f"{size / GiB:.2f}" for size in sizes)])
    return [*aligned(rows), *([] if capacity is None else [f"a device has {capacity:g} GiB"])]


def _training(ones: Sequence[tuple[Priced, Figures]]) -> list[str]:
    rows = [["training", "days", "device hours", "$", "kWh"]]
    for place, (_, found) in enumerate(ones, start=1):
        rows.append([str(place), *_spent(found.costs)])
    return [*aligned(rows), f"for {ones[0][1].costs.tokens:,.0f} tokens, without restarts and validation"]


def _spent(costs: Costs) -> list[str]:
    return [
        f"{costs.days:,.2f}",
        f"{costs.device_hours:,.1f}",
        "-" if costs.usd is None else f"{costs.usd:,.0f}",
        "-" if costs.kwh is None else f"{costs.kwh:,.1f}",
    ]


def _verdict(answer: Answer) -> list[str]:
    best, others = answer.best[0], answer.best[1:]
    interval = interval_of(best.quantities.job, dict(answer.intervals))
    regime = regime_of(best.quantities.job)
    result = [f"the first one's interval is from {interval.rows} runs of {interval.sources} sources ({regime})"]
    if others:
        result.append(f"why not the second: {why_slower(best, others[0])}")
    if ties := answer.ties:
        result.append(f"a tie with the first, as the intervals overlap: {', '.join(map(str, ties))}")
    return result


def aligned(rows: Sequence[Sequence[str]], left: tuple[int, ...] = ()) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            f"{cell:<{width}}" if i in left else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def values(answer: Answer) -> dict[str, Any]:
    """The answer for programs."""
    return {
        "model": answer.base.config.model.name,
        "hardware": answer.base.config.hardware.name,
        "nproc": answer.base.world_size,
        "global_batch_size": answer.base.config.train.global_batch_size,
        "seq_len": answer.base.config.train.seq_len,
        "seconds": answer.seconds,
        "searched": {
            name: {"valid": one.valid, "priced": one.priced, "replayed": len(one.best), "unknown": dict(one.unknown)}
            for name, one in answer.outcomes.items()
        },
        "left_out": left_out(answer.base.config, next(iter(answer.outcomes)), answer.price),
        "ties": answer.ties,
        "why_not_the_second": why_slower(*answer.best[:2]) if len(answer.best) > 1 else None,
        "command": command(answer),
        "layouts": [_layout(one, found) for one, found in answer.shown],
    }


def _layout(one: Priced, found: Figures) -> dict[str, Any]:
    return {
        "name": one.layout.name,
        "overrides": one.layout.words,
        "products": one.quantities.job.products,
        "regime": regime_of(one.quantities.job),
        **dataclasses.asdict(found),
        "step_s": parts(one),
        "memory_bytes": dict(one.footprint.kinds) | {"kept free": one.reserve},
    }
