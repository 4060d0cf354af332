"""Each rank of a test world counts the third step of each job with `train/ledger.py`, beside what it should be."""

import dataclasses
from pathlib import Path

from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from train import prove
from train.communication import expected, totals
from train.data import load_corpus
from train.distributed import build_mesh, choose_runtime, own_rows
from train.ledger import Ledger
from train.model import Transformer, dtypes
from train.plan import Plan
from train.shapes import held, state_bytes
from train.world import World


def run(job: prove.Job, world: World, folder: Path) -> prove.Result:
    """Written by every rank, as ranks differ: under `job.name` and the rank."""
    _clear_sharding_prop_cache()  # or an earlier job's mesh, equal to this one's, lives on with groups of its own
    config = prove.configured(job.overrides)
    plan = Plan(config, world.world_size)
    runtime = choose_runtime(config.runtime, world)
    mesh = build_mesh(config, runtime)
    step = config.strategy.build(Transformer(config.model, **dtypes(config.precision)), mesh, config)
    size = config.train.global_batch_size
    batch = [x.to(runtime.device) for x in load_corpus(config).batch(1, size, own_rows(mesh, size))]
    for _ in range(2):  # a pipeline greets its neighbours in the first, DDP sorts its buckets for the second
        step(*batch, lr=1e-3)
    with Ledger(mesh) as ledger:
        step(*batch, lr=1e-3)
    wanted = totals(expected(plan, world.rank))
    result = {
        "measured": {f"{axis}/{op}": dataclasses.astuple(t) for (axis, op), t in sorted(ledger.totals.items())},
        "expected": {f"{axis}/{op}": dataclasses.astuple(t) for (axis, op), t in sorted(wanted.items())},
        "held": {name: list(p.shape) for name, p in local_shapes(step)},
        "expected_held": held(plan, world.rank),
        "state": step.state_bytes(),
        "expected_state": state_bytes(plan, world.rank),
    }
    prove.write(folder, {"name": f"{job.name} rank{world.rank}", **result})
    return {}


def local_shapes(step):
    from train.gradients import local

    return [(name, local(p)) for name, p in step.parameters.items()]


if __name__ == "__main__":
    prove.main(run)
