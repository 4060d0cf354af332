"""Where a strategy goes wrong, as `scripts/verify.py` prints it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import psutil

from scripts.verifying.task import Task
from train.config.plan import Plan
from train.config.schema import Config, Precision
from train.proof.locating.finding import Search

GiB = 2**30
WIDEST = 8  # bytes of a float64


@dataclass(frozen=True)
class Place:
    """A search for what is wrong, or the `problem` for which there was none."""

    search: Search | None = None
    problem: str = ""


def differs(result: dict[str, Any]) -> bool:
    """Whether a column differs that should not. `result`: of a job of the proof."""
    from train.proof.comparison import Verdict

    return any(not Verdict(*values).ok for values in result.get("verdicts", ()))


def add_places(results: dict[str, dict[str, Any]], task: Task, run_traced: Callable[[Task], Any]) -> None:
    """Search for the first thing that is wrong where the task wants it, and add it to the results as "place"."""
    wanted = [name for name, one in results.items() if "verdicts" in one and task.wants_place(differs=differs(one))]
    refused = {name: why for name in wanted if (why := too_large(task.subjects[name].config))}
    searched = [name for name in wanted if name not in refused]
    traced = run_traced(task.only(searched)) if searched else {}
    for name in wanted:
        place = Place(problem=refused[name]) if name in refused else place_of(traced[name])
        if name in traced and "verdicts" in traced[name] and differs(traced[name]) != differs(results[name]):
            place = Place(problem="the second run did not give the same answer: results change from run to run")
        results[name]["place"] = place


def place_of(result: dict[str, Any]) -> Place:
    """`result`: of a traced job of the proof."""
    if "search" in result:
        return Place(result["search"])
    reason = result.get("unjudged") or result.get("error", "").strip().splitlines()[-1:]
    return Place(problem=f"the search has failed ({reason if isinstance(reason, str) else ''.join(reason)})")


def too_large(config: Config) -> str:
    """Why the traces of this config are not made; empty if they are. They hold what every module gives, and its
    gradient, in two steps of three runs, on the host."""
    model, train = config.model, config.train
    width = model.num_layers * (12 * model.dim + 3 * max(model.ffn_dim, model.top_k * model.expert_ffn_dim))
    size = WIDEST if config.precision is Precision.float64 else WIDEST // 2
    needed = 12 * size * train.global_batch_size * train.seq_len * (width + 2 * model.vocab_size)
    if needed <= psutil.virtual_memory().available / 2:
        return ""
    return f"its traces need {needed / GiB:.0f} GiB, over half of the free memory: use fewer or shorter sequences"


def lines(place: Place, plan: Plan, *, wrong: bool) -> Iterator[str]:
    """What is printed below the table of a strategy. `wrong`: whether a column differs."""
    if place.search is None:
        yield f"not located: {place.problem}"
        return
    if place.search.finding is not None:
        yield place.search.finding.sentence()
    elif wrong:
        yield "not located: what was recorded is right, as far as rounding allows; the mistake is in something else"
    else:
        yield "nothing wrong was found in what is recorded (docs/proof.md says what is not)"
    if place.search.unseen:
        first, *others = place.search.unseen
        yield f"not recorded: {first}" + (f" and {len(others)} more" if others else "")
    if plan.config.precision.casts:
        yield f"in {plan.config.precision.value} only the first step is searched"
    if plan.config.compile.enabled:
        yield "inside compiled blocks nothing is recorded: use compile.enabled=false"
