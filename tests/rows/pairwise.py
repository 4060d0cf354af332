"""Rows that cover every pair of levels of these factors that the rules allow, so that two techniques that do not work
together make some row fail. The rows are stored as text, so that every run has the same ones. `python -m
tests.rows.pairwise` draws new ones, and tests/test_rules.py checks that no pair is left out.
"""

import random
from itertools import combinations
from math import prod

from tests.rows.base import F64, Row, configured
from train.command.validate import findings
from train.config.plan import Plan

Levels = tuple[str, ...]
FACTORS: dict[str, dict[str, tuple[str, ...]]] = {
    "pipeline": {
        "-": (),
        **{
            name: ("strategy.pp=2", f"strategy.schedule={name}")
            for name in (
                *("gpipe", "1f1b", "interleaved_1f1b", "looped_bfs"),
                *("interleaved_zero_bubble", "zbv_zero_bubble", "dualpipev"),
            )
        },
    },
    "data": {
        "-": (),
        "ddp": ("strategy.dp_replicate=2",),
        "fsdp": ("strategy.dp_shard=2",),
        "hsdp": ("strategy.dp_replicate=2", "strategy.dp_shard=2"),
    },
    "context": {"-": ()}
    | {name: ("strategy.cp=2", f"strategy.cp_method={name}") for name in ("allgather", "ring", "ulysses")},
    "tensor": {"-": (), "sp": ("strategy.tp=2",), "whole": ("strategy.tp=2", "strategy.sequence_parallel=false")},
    "model": {"dense": (), "moe": ("model=moe_tiny",), "ep": ("model=moe_tiny", "strategy.ep=2")},
    "recompute": {name: (f"train.activation_checkpointing={name}",) for name in ("none", "full", "selective")},
    "ends": {"apart": (), "tied": ("model.tie_embeddings=true",)},
    "microbatches": {"1": (), "4": ()},  # of a pipeline; elsewhere 1 and 2
    "targets": {"all": ("data.ignore_token=null",), "masked": ()},
}
NAMES = tuple(FACTORS)
SIZES = (2, 4, 8)
TRIES = 400


def as_row(levels: Levels) -> Row:
    chosen = dict(zip(NAMES, levels, strict=True))
    words = [word for name in NAMES for word in FACTORS[name][chosen[name]]]
    degrees = {word.split("=")[0]: 2 for word in words if word.endswith("=2")}
    data_ranks = 2 ** sum(key in degrees for key in ("strategy.dp_replicate", "strategy.dp_shard"))
    size = 2 ** sum(key != "strategy.ep" for key in degrees)
    base = "strategy=single" if chosen["pipeline"] == "-" else "strategy=pp"
    own = [word for word in words if word.startswith(("strategy.", "train."))]
    shared = [F64, *(word for word in words if word not in own)]
    shared += [f"train.global_batch_size={int(chosen['microbatches']) * data_ranks}"]
    if chosen["model"] != "dense":
        shared += ["model.balance=aux_loss", "model.num_experts=4"]  # two on each rank of ep
    return Row(size, (base, *own), tuple(shared))


def is_valid(levels: Levels) -> bool:
    row = as_row(levels)
    return row.size in SIZES and not any(findings(Plan(configured(row.overrides), row.size)))


def pairs(levels: Levels) -> set[tuple[tuple[str, str], ...]]:
    return set(combinations(zip(NAMES, levels, strict=True), 2))


def all_pairs() -> set[tuple[tuple[str, str], ...]]:
    return {((a, x), (b, y)) for a, b in combinations(NAMES, 2) for x in FACTORS[a] for y in FACTORS[b]}


def with_pair(pair: tuple[tuple[str, str], ...], tries: int, draw: random.Random) -> list[Levels]:
    """The valid rows among this many random rows with this pair."""
    found = []
    for _ in range(tries):
        chosen = {name: draw.choice(list(levels)) for name, levels in FACTORS.items()} | dict(pair)
        levels = tuple(chosen[name] for name in NAMES)
        if is_valid(levels):
            found.append(levels)
    return found


def cost(levels: Levels) -> float:
    """The time of the row relative to the others, by a fit to the seconds of 44 rows (off by a third on average)."""
    chosen = dict(zip(NAMES, levels, strict=True))
    whole = chosen["pipeline"] in ("-", "gpipe", "1f1b")  # one stage on a rank
    factors = [
        (1.9, as_row(levels).size == 8),
        (2.3, not whole),
        (1.6, chosen["pipeline"] != "-" and chosen["microbatches"] == "4"),
        (1.6, chosen["model"] != "dense"),
        (1.3, chosen["recompute"] != "none"),
        (1.3, chosen["context"] == "ring"),
    ]
    return prod(factor for factor, applies in factors if applies)


def draw_rows(seed: int = 3) -> list[Levels]:
    """Greedy choice: for a pair that is not covered yet, the candidate that covers most such pairs for its cost. At the
    end, rows of which others cover all pairs are left out, the most expensive first."""
    draw, missing, rows = random.Random(seed), sorted(all_pairs()), list[Levels]()
    while missing:
        pair = missing[0]
        if candidates := with_pair(pair, TRIES, draw):
            best = max(candidates, key=lambda levels: len(pairs(levels).intersection(missing)) / cost(levels))
            rows.append(best)
            missing = [other for other in missing if other not in pairs(best)]
        else:
            missing = missing[1:]
    for row in sorted(rows, key=cost, reverse=True):
        others = [other for other in rows if other != row]
        if pairs(row) <= set().union(*map(pairs, others)):
            rows = others
    return rows


ROWS: list[Row] = []
TABLE = """
gpipe ddp - - dense none tied 1 masked
gpipe - - sp moe none apart 1 all
- ddp allgather - dense full apart 1 all
1f1b - allgather - moe none tied 4 masked
- fsdp allgather - ep full apart 4 masked
- - allgather whole dense selective apart 1 all
- - allgather sp dense selective tied 4 masked
- fsdp ring - dense none apart 1 all
looped_bfs - ring - dense none tied 1 all
- ddp ring - moe selective tied 4 masked
- hsdp ring - ep none tied 4 all
- - ring whole moe full tied 4 all
zbv_zero_bubble - ring sp dense none tied 1 masked
gpipe - ulysses - dense selective apart 1 all
- fsdp ulysses sp ep full apart 4 masked
interleaved_zero_bubble - ulysses - moe none apart 1 all
interleaved_1f1b - ulysses whole dense none tied 1 masked
1f1b ddp ulysses - dense selective apart 4 all
zbv_zero_bubble fsdp - - moe selective tied 1 all
- hsdp allgather - dense selective tied 1 masked
- hsdp ulysses - dense full tied 4 all
interleaved_1f1b hsdp - - moe selective apart 1 masked
- hsdp - sp dense none apart 4 masked
- hsdp - whole dense none tied 1 all
1f1b - - sp dense full apart 4 masked
1f1b - ring whole dense none apart 4 all
1f1b fsdp - - ep none apart 4 masked
1f1b hsdp - - dense none tied 4 masked
dualpipev - allgather - dense none apart 4 masked
dualpipev - ring - dense selective tied 4 masked
dualpipev - ulysses - dense full apart 4 masked
dualpipev hsdp - - moe none apart 4 masked
dualpipev fsdp - sp ep none tied 4 all
dualpipev - - whole dense none apart 4 all
gpipe - allgather - dense full tied 1 masked
gpipe - ring - dense none tied 4 all
gpipe fsdp - - ep none apart 1 all
gpipe hsdp - - dense none tied 1 masked
gpipe - - whole dense none tied 1 all
interleaved_1f1b - allgather - dense full apart 1 all
interleaved_1f1b - ring - dense none tied 4 masked
interleaved_1f1b ddp - - dense none apart 1 masked
interleaved_1f1b fsdp - - ep none apart 1 masked
interleaved_1f1b - - sp dense none apart 1 all
interleaved_zero_bubble - allgather - dense full tied 1 all
interleaved_zero_bubble - ring - dense selective apart 1 masked
interleaved_zero_bubble hsdp - - dense none tied 4 masked
interleaved_zero_bubble fsdp - whole ep none tied 1 all
interleaved_zero_bubble - - sp dense none apart 1 masked
looped_bfs - allgather - dense full tied 1 all
looped_bfs - ulysses - dense selective apart 1 all
looped_bfs ddp - - dense none tied 4 masked
looped_bfs hsdp - - moe none tied 1 masked
looped_bfs fsdp - sp ep none tied 1 all
looped_bfs - - whole dense none tied 1 all
zbv_zero_bubble - allgather - dense full apart 1 all
zbv_zero_bubble - ulysses - dense none tied 4 all
zbv_zero_bubble hsdp - - ep none apart 1 all
zbv_zero_bubble - - whole dense none apart 1 all
"""
SLOW_ROWS = [as_row(tuple(line.split())) for line in TABLE.strip().splitlines()]

if __name__ == "__main__":
    print("\n".join(" ".join(levels) for levels in draw_rows()))
