"""Rows that cover every pair of levels of these factors that the rules allow, so that two techniques that do not work
together make some row fail. The rows are stored as text, so that every run has the same ones. `python -m
tests.rows.pairwise` draws new ones, and tests/test_rules.py checks that no pair is left out.
"""

import random
from itertools import combinations

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
        shared += ["model.balance=aux_loss"]
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


def draw_rows(seed: int = 0) -> list[Levels]:
    """Greedy choice: for a pair that is not covered yet, the candidate that covers most such pairs."""
    draw, missing, rows = random.Random(seed), sorted(all_pairs()), list[Levels]()
    while missing:
        pair = missing[0]
        if candidates := with_pair(pair, TRIES, draw):
            best = max(candidates, key=lambda levels: len(pairs(levels).intersection(missing)))
            rows.append(best)
            missing = [other for other in missing if other not in pairs(best)]
        else:
            missing = missing[1:]
    return rows


ROWS: list[Row] = []
TABLE = """
- hsdp - - ep full apart 1 all
looped_bfs fsdp - whole moe none tied 4 masked
interleaved_1f1b - - sp dense selective apart 1 masked
1f1b ddp allgather - moe selective apart 4 all
gpipe - allgather whole dense full tied 1 all
interleaved_zero_bubble fsdp allgather - ep none apart 1 masked
- fsdp allgather sp dense none tied 4 all
zbv_zero_bubble - ring - moe full apart 4 masked
interleaved_1f1b ddp ring - dense none tied 4 masked
interleaved_zero_bubble - ring sp moe selective apart 1 all
dualpipev fsdp ring - ep full tied 4 all
- - ring whole moe selective tied 1 masked
looped_bfs ddp ulysses - dense selective apart 1 all
1f1b - ulysses sp dense full tied 4 masked
gpipe fsdp ulysses - ep none apart 4 all
zbv_zero_bubble - ulysses whole moe none apart 1 masked
gpipe ddp - - moe full tied 4 masked
zbv_zero_bubble fsdp - sp moe selective tied 1 all
- hsdp allgather - moe none tied 4 masked
- hsdp ring - dense selective tied 4 all
- hsdp ulysses - moe selective apart 1 masked
- hsdp - sp ep full tied 1 masked
- hsdp - whole ep none tied 1 all
- ddp allgather - moe none tied 1 masked
1f1b fsdp - whole ep none tied 4 masked
1f1b - ring sp moe full tied 4 all
1f1b hsdp - - dense full tied 4 masked
dualpipev - - sp moe none apart 4 masked
dualpipev - allgather whole dense selective tied 4 masked
dualpipev - ulysses whole moe none tied 4 all
dualpipev hsdp - - dense full apart 4 all
gpipe - ring sp dense selective tied 1 all
gpipe hsdp - - moe full apart 1 masked
interleaved_1f1b - allgather whole moe full tied 4 all
interleaved_1f1b fsdp ulysses - ep none tied 1 masked
interleaved_1f1b hsdp - - dense selective tied 4 masked
interleaved_zero_bubble - - whole dense full tied 4 masked
interleaved_zero_bubble - ulysses - dense full tied 4 masked
interleaved_zero_bubble hsdp - - dense selective tied 1 all
looped_bfs - allgather sp dense full tied 4 all
looped_bfs fsdp ring - ep none apart 4 all
looped_bfs hsdp - - moe full apart 4 all
zbv_zero_bubble - allgather whole dense selective tied 1 masked
zbv_zero_bubble hsdp - - ep full tied 1 masked
"""
SLOW_ROWS = [as_row(tuple(line.split())) for line in TABLE.strip().splitlines()]

if __name__ == "__main__":
    print("\n".join(" ".join(levels) for levels in draw_rows()))
