"""Dropout > 0: masks differ for other tokens or layers, are equal on replicas, and are the same when recomputed.

Ranks draw other masks than one device, so their results cannot be equal. These properties are tested instead. The
seeds are fixed, so a bound of five standard deviations fails in every run or in none (tests/masks.py).
"""

from dataclasses import dataclass
from typing import Any

import pytest

from tests.rows.base import F64
from tests.running import job, run_jobs

SIGMAS = 5
SMALL = ("model.num_layers=2", "train.seq_len=32", "train.micro_batch_size=1", "train.steps=2", F64)
DROPOUT = "model.dropout=0.2"
WHOLE_SEQUENCE = "strategy.sequence_parallel=false"  # tp's ranks hold the same activations
FULL, SELECTIVE = (f"train.activation_checkpointing={mode}" for mode in ("full", "selective"))


@dataclass(frozen=True)
class Layout:
    """`alike`: pairs of ranks with the same tokens. `bug`: a planted bug, and the statements that it makes false."""

    size: int
    words: tuple[str, ...]
    alike: tuple[str, ...] = ()
    bug: str = ""
    breaks: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        words = [word.rpartition(".")[2].removeprefix("strategy=") for word in self.words]
        return " ".join([*words, f"ws{self.size}"] + ([f"BUG:{self.bug}"] if self.bug else []))

    @property
    def recomputes(self) -> bool:
        return bool({FULL, SELECTIVE} & set(self.words))


def layout(size: int, *words: str, alike: tuple[str, ...] = (), bug: str = "", breaks: tuple[str, ...] = ()) -> Layout:
    return Layout(size, words, alike, bug, frozenset(breaks))


LAYOUTS = [
    layout(2, "strategy=dp"),
    layout(2, "strategy=tp", FULL),
    layout(2, "strategy=tp", WHOLE_SEQUENCE, alike=("0 1",)),
    layout(2, "strategy=cp"),
    layout(2, "strategy=pp"),
    layout(2, "strategy=ep", "model=moe_tiny"),
]
SLOW_LAYOUTS = [
    layout(2, "strategy=fsdp", SELECTIVE),
    layout(2, "strategy=tp"),
    layout(2, "strategy=tp", WHOLE_SEQUENCE, SELECTIVE, alike=("0 1",)),
    layout(2, "strategy=cp", "strategy.cp_method=ring", FULL),
    layout(2, "strategy=pp", FULL),
    layout(4, "strategy=fsdp_tp"),
    layout(4, "strategy=fsdp_tp", WHOLE_SEQUENCE, alike=("0 1", "2 3")),
]
BUGS = [
    layout(2, "strategy=dp", bug="masks_equal_on_all_ranks", breaks=("ranks with other tokens differ",)),
    layout(2, "strategy=pp", bug="masks_equal_on_all_ranks", breaks=("ranks with other tokens differ",)),
    layout(
        4,
        *("strategy=fsdp_tp", WHOLE_SEQUENCE),
        alike=("0 1", "2 3"),
        bug="masks_equal_on_all_ranks",
        breaks=("ranks with other tokens differ",),
    ),
    layout(
        2,
        *("strategy=tp", WHOLE_SEQUENCE),
        alike=("0 1",),
        bug="masks_differ_where_tokens_are_replicated",
        breaks=("replicas are equal",),
    ),
    layout(2, "strategy=dp", bug="masks_start_anew", breaks=("no mask comes twice", "masks are independent in time")),
    layout(2, "strategy=tp", FULL, bug="masks_not_replayed", breaks=("the backward's mask is the forward's",)),
]


@pytest.fixture(scope="module")
def found(request, tmp_path_factory):
    """Results of the selected layouts of a size, all in one world."""
    done = {}
    selected = [item.callspec.params["layout"] for item in request.session.items if item.module is request.module]

    def results(layout):
        if layout.size not in done:
            jobs = [
                job(f"CHECK:dropout {other.name}", [*SMALL, DROPOUT, *other.words])
                for other in dict.fromkeys(selected)
                if other.size == layout.size
            ]
            folder = tmp_path_factory.mktemp(f"dropout_{layout.size}")
            done[layout.size] = run_jobs(folder, jobs, size=layout.size, timeout_s=120)
        result = done[layout.size][f"CHECK:dropout {layout.name}"]
        assert "error" not in result, result["error"]
        return result

    return results


def statements(found: dict, layout: Layout) -> dict[str, bool]:
    """The statements that must be true, and whether each is."""
    others = [pair for pair in found["equal"] if pair not in layout.alike]
    return {
        "replicas are equal": all(found["equal"][pair] == 1 for pair in layout.alike),
        "ranks with other tokens differ": all(
            found["equal"][pair] == 0 and abs(found["agreement"][pair]) < SIGMAS for pair in others
        ),
        "no mask comes twice": found["repeated"] == 0,
        "masks are independent in time": max(map(abs, found["agreement_over_time"])) < SIGMAS,
        "the share of 1 - p is kept": max(map(abs, found["surplus"])) < SIGMAS
        and found["largest_surplus_of_one"] < SIGMAS,
        "what is kept is divided by 1 - p": found["exact"],
        "the backward's mask is the forward's": found["replayed"],
        "recomputed if asked": (found["recomputed"] > 0) == layout.recomputes,
        "evaluation drops nothing": found["evaluated"] > 0 and found["changed_in_evaluation"] == 0,
    }


def name(layout: Layout) -> str:
    return layout.name


def slow(layout: Layout) -> Any:
    return pytest.param(layout, marks=pytest.mark.slow)


@pytest.mark.timeout(300)  # a world runs all its layouts under its first one's clock
@pytest.mark.parametrize("layout", [*LAYOUTS, *map(slow, SLOW_LAYOUTS)], ids=name)
def test_masks(layout, found):
    result = found(layout)
    wrong = [statement for statement, holds in statements(result, layout).items() if not holds]
    assert not wrong, result
    # as many as every dropout of the model draws: enough for the bounds to mean something
    assert min(result["elements"]) >= 2 * 4 * 4 * 32 * 128 // layout.size


@pytest.mark.timeout(300)
@pytest.mark.parametrize("layout", [slow(one) if one.size > 2 else one for one in BUGS], ids=name)
def test_planted_bug_is_seen(layout, found, record_property):
    result = found(layout)
    wrong = {statement for statement, holds in statements(result, layout).items() if not holds}
    record_property("planted_bug", f"{layout.bug} ({layout.name.partition(' BUG')[0]}): not so: {', '.join(wrong)}")
    assert result["patched_calls"] > 0, "the patched line never ran"
    assert wrong == layout.breaks
