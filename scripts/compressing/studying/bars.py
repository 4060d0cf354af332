"""Whether a study reaches what the lab asks of its methods. Torch is not imported.

Costs are paired: of each seed, in % of the loss of its own parent or of its own control. The spread is the largest cost
of the seeds minus the smallest. A cost that is not larger than its spread is "no measurable loss"; with one seed the
spread is not known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from scripts.compressing.record import Record
from scripts.compressing.words import DISTIL, PRUNE_2_4, QAT, TRAINED_ON

POST_TRAINING = "8da4w"  # what quantisation-aware training is compared with
INT8_COST_PCT, INT8_BYTES = 0.1, 0.30
QAT_SHARE, PRUNED_COST_PCT, CLOSED = 0.5, 1.0, 0.5

Row = Mapping[str, Any]


def verdicts(rows: Sequence[Row]) -> list[str]:
    """A line for each bar that the rows can be judged by."""
    of = _Found(rows)
    makers: tuple[Callable[[_Found], str | None], ...] = (_int8, _qat, _pruned, _student)
    return [line for maker in makers if (line := maker(of)) is not None]


class _Found:
    """The records by seed of the first device, of a method with some options."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.records: list[tuple[int, str, Record]] = []
        seen = set()
        for row in rows:
            if "record" in row and (key := (row["seed"], row["of"], row["label"])) not in seen:
                seen.add(key)
                self.records.append((row["seed"], row["of"], Record.of(row["record"])))

    def __call__(self, method: str, of: str = "parent", **options: Any) -> dict[int, Record]:
        return {
            seed: record
            for seed, whose, record in self.records
            if whose == of and record.method == method and options.items() <= record.options.items()
        }

    def costs(self, method: str, of: str = "parent", **options: Any) -> list[float]:
        return [record.cost_pct for record in self(method, of, **options).values()]


def _int8(of: _Found) -> str | None:
    found = of("int8_weight_only")
    if not found:
        return None
    cost = max(record.cost_pct for record in found.values())
    size = max(record.after.bytes / record.before.bytes for record in found.values())
    good = cost <= INT8_COST_PCT and size <= INT8_BYTES
    head = f"int8_weight_only: at most {cost:+.3f} % of loss at {100 * size:.1f} % of the bytes"
    return f"{head}: {_met(good)} (0.1 %, 30 %)"


def _qat(of: _Found) -> str | None:
    post, trained = of.costs(POST_TRAINING, TRAINED_ON), of.costs(QAT)
    if not post or not trained:
        return None
    head = f"{QAT}: {_shown(trained)}, {POST_TRAINING} of the parent trained on: {_shown(post)}"
    if not _measurable(post):
        return f"{head}: no measurable loss to win back"
    return f"{head}: {_met(_mean(trained) <= QAT_SHARE * _mean(post))} (half)"


def _pruned(of: _Found) -> str | None:
    found = {score: costs for score in ("magnitude", "wanda") if (costs := _retrained(of, score))}
    if not found:
        return None
    score, costs = min(found.items(), key=lambda item: _mean(item[1]))
    good = _met(_mean(costs) <= PRUNED_COST_PCT) if _measurable(costs) else "no measurable loss"
    return f"{PRUNE_2_4} score={score} with retraining: {_shown(costs)}: {good} (1 %)"


def _retrained(of: _Found, score: str) -> list[float]:
    return [record.cost_pct for record in of(PRUNE_2_4, score=score).values() if record.options.get("retrain")]


def _student(of: _Found) -> str | None:
    control = of(DISTIL, init="scratch", kl=False)
    students = {(init, kl): of(DISTIL, init=init, kl=kl) for init in ("teacher", "scratch") for kl in (True, False)}
    del students["scratch", False]
    known = {name: found for name, found in students.items() if found and found.keys() <= control.keys()}
    if not control or not known:
        return None
    gaps = [record.after.loss - record.before.loss for record in control.values()]
    lines = []
    for (init, kl), found in known.items():
        shares = [(control[seed].after.loss - one.after.loss) / (control[seed].after.loss - one.before.loss)
                  for seed, one in found.items()]  # fmt: skip
        lines.append((_mean(shares), f"init={init} kl={str(kl).lower()} closes {100 * _mean(shares):.0f} %"))
    head = f"{DISTIL}: a gap of {_mean(gaps):.4f} between control and teacher; {'; '.join(text for _, text in lines)}"
    good = _met(max(lines)[0] >= CLOSED) if _measurable(gaps) else "the gap is not above its spread"
    return f"{head}: {good} (50 %)"


def _measurable(values: Sequence[float]) -> bool:
    return len(values) < 2 or _mean(values) > max(values) - min(values)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _shown(costs: Sequence[float]) -> str:
    spread = f" (spread {max(costs) - min(costs):.2f})" if len(costs) > 1 else ""
    return f"{_mean(costs):+.2f} %{spread}"


def _met(good: bool) -> str:
    return "reached" if good else "missed"
