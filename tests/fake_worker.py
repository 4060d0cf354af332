"""Run one step of each config as one rank of a world without other ranks; print the failures as JSON.

argv: a file with a JSON list of {"overrides": […], "world_size": N, "rank": R}. With "count": true, it runs three
steps, and the traffic of the third one is compared with its closed form. The fake process group accepts every
collective and sends nothing, so the losses have no meaning. What is tested: nothing raises, and every collective gets
tensors of the right shapes, as NCCL requires. It is a separate process, because a world that hangs must be ended from
outside.

Where the code reads a result, the missing ranks are imitated: a sum is this rank's part, the neighbour in a pipeline
agrees, and every rank sends as many tokens to this rank's experts as this rank sends to its experts.
"""

import json
import sys
import traceback
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from train.command.cli import configured
from train.config.plan import Plan
from train.config.traffic import totals
from train.data.corpus import load_corpus
from train.measure.ledger import Ledger
from train.model.transformer import Transformer, dtypes
from train.ranks import collectives
from train.ranks.distributed import Runtime, build_mesh, own_rows
from train.ranks.gradients import local
from train.strategies.memory import parameter_shapes, state_bytes
from train.strategies.traffic import expected_traffic


def one_step(overrides: list[str], world_size: int, rank: int, *, count: bool = False) -> None:
    config = configured(overrides)
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        _clear_sharding_prop_cache()  # or an equal mesh of an earlier world lives on
        mesh = build_mesh(config, Runtime(torch.device("cpu"), "fake"))
        step = config.strategy.build(Transformer(config.model, **dtypes(config.precision)), mesh, config)
        size = config.train.global_batch_size
        batch = load_corpus(config).batch(1, size, own_rows(mesh, size))
        step(*batch, lr=1e-3)
        if count:
            step(*batch, lr=1e-3)
            compare(step, batch, mesh, Plan(config, world_size), rank)
        step.evaluate(*batch)
        step.state_bytes()
    finally:
        dist.destroy_process_group()


def compare(step, batch, mesh, plan: Plan, rank: int) -> None:
    with Ledger(mesh) as ledger:
        step(*batch, lr=1e-3)
    said = totals(expected_traffic(plan, rank))
    keys = sorted(ledger.totals.keys() | said.keys())
    wrong = {key: (ledger.totals.get(key), said.get(key)) for key in keys if ledger.totals.get(key) != said.get(key)}
    assert not wrong, f"(measured, closed form): {wrong}"
    shapes = {name: tuple(local(p).shape) for name, p in step.parameters.items()}
    assert shapes == parameter_shapes(plan, rank)
    assert step.state_bytes() == state_bytes(plan, rank)


def answered(x, group, exchange=collectives.exchange):
    """Numbers of rows are returned as given, as if every rank had sent as many to this one. Other tensors are exchanged
    by the fake group, which sends nothing."""
    other = exchange(x, group)
    return other if x.is_floating_point() else x


def summed(tensor, *args, all_reduce=dist.all_reduce, **options):
    """`dist.all_reduce`, whose work also has a future with a value."""
    work = all_reduce(tensor, *args, **options)
    future: torch.futures.Future[list[torch.Tensor]] = torch.futures.Future()
    future.set_result([tensor])
    return work and SimpleNamespace(get_future=lambda: future, wait=lambda: True)


def main() -> None:
    failures = []
    with ExitStack() as played:
        played.enter_context(mock.patch.object(dist, "all_reduce", summed))
        played.enter_context(mock.patch.object(dist, "recv", lambda tensor, **_: tensor.fill_(1)))
        played.enter_context(mock.patch.object(collectives, "exchange", answered))
        for job in json.loads(Path(sys.argv[1]).read_text()):
            print(json.dumps(job), file=sys.stderr, flush=True)  # the last one, where it hangs
            try:
                one_step(**job)
            except Exception:
                failures.append(job | {"error": traceback.format_exc()})
    print(json.dumps(failures))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
