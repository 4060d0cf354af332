"""Rules of the batch, which the data ranks share."""

from __future__ import annotations

from train.config.fields import MAX_SEQUENCES
from train.config.plan import Plan
from train.config.rule import Finding, Rule, divisors, nearest


def batch_splits(plan: Plan) -> Finding | None:
    train, ranks = plan.config.train, plan.data_ranks
    unit = train.micro_batch_size * ranks
    if train.global_batch_size % unit == 0:
        return None
    sizes = [max(round(train.global_batch_size / unit), 1) * unit]
    sizes += [unit * factor for factor in (1, 2, 4, 8, 16, 32, 64)]
    fixes = [f"train.global_batch_size={size}" for size in dict.fromkeys(sizes)]
    if train.global_batch_size % ranks == 0:
        options = nearest(divisors(train.global_batch_size // ranks), train.micro_batch_size)
        fixes += [f"train.micro_batch_size={size}" for size in options]
    return Finding(
        f"train.global_batch_size={train.global_batch_size} is not divisible by train.micro_batch_size="
        f"{train.micro_batch_size} x {ranks} data ranks",
        tuple(fixes),
        f"use a train.global_batch_size that {unit} divides",
    )


def validation_windows(plan: Plan) -> Finding | None:
    train = plan.config.train
    if train.eval_batches * train.global_batch_size <= MAX_SEQUENCES:
        return None
    most = max(MAX_SEQUENCES // train.global_batch_size, 1)
    return Finding(
        f"train.eval_batches={train.eval_batches} x train.global_batch_size={train.global_batch_size} are more than "
        f"{MAX_SEQUENCES:,} windows per evaluation",
        ("train.eval_batches=8", f"train.eval_batches={most}"),
        "use fewer train.eval_batches",
    )


RULES = (
    Rule("batch_splits", "every data rank does the same whole number of microbatches", batch_splits),
    Rule("validation_windows", "the positions of all windows of an evaluation are kept in memory", validation_windows),
)
