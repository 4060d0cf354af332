"""Each rank of a test world counts the traffic of the third step of each job (`train/measure/ledger.py`), and adds the
expected traffic."""

import dataclasses
from typing import Any

from train.config.plan import Plan
from train.config.shapes import coordinates, folded_place
from train.config.traffic import totals
from train.data.corpus import load_corpus
from train.measure.ledger import Ledger
from train.model.transformer import Transformer, dtypes
from train.proof import jobs
from train.ranks.distributed import own_rows
from train.ranks.gradients import local
from train.strategies.memory import parameter_shapes, state_bytes
from train.strategies.traffic import expected_traffic, unknown_traffic


def run(job: jobs.Job, site: jobs.Site) -> jobs.Result:
    """Every rank writes its result, because ranks differ, under `job.name` and its rank."""
    config = job.config
    plan, rank = Plan(config, site.world.world_size), site.world.rank
    mesh = site.mesh(config)
    step: Any = config.strategy.build(Transformer(config.model, **dtypes(config.precision)), mesh, config)
    size = config.train.global_batch_size
    batch = [x.to(site.runtime.device) for x in load_corpus(config).batch(1, size, own_rows(mesh, size))]
    for _ in range(2):  # a pipeline greets its neighbours in the first, DDP sorts its buckets for the second
        step(*batch, lr=1e-3)
    with Ledger(mesh) as ledger:
        step(*batch, lr=1e-3)
    result = {"measured": by_name(ledger.totals), "state": step.state_bytes()}
    if not unknown_traffic(plan):
        result |= said(plan, rank) | {"held": {name: list(local(p).shape) for name, p in step.parameters.items()}}
    jobs.write(site.folder, {"name": f"{job.name} rank{rank}", **result})
    return {}


def said(plan, rank):
    place, rows = coordinates(plan, rank), expected_traffic(plan, rank)
    return {
        "expected": by_name(totals(rows)),
        "exact": by_name(totals(row for row in rows if not row.mean)),
        "means": sorted({f"{row.axis}/{row.op}" for row in rows if row.mean}),
        "ep_group": [place["pp"], place["dp_replicate"], folded_place(plan, place)[1] // plan.ep, place["tp"]],
        "expected_held": parameter_shapes(plan, rank),
        "expected_state": state_bytes(plan, rank),
    }


def by_name(found):
    return {f"{axis}/{op}": dataclasses.astuple(total) for (axis, op), total in sorted(found.items())}
