"""Functions that each rank of a test world runs, for properties that the equivalence table cannot show. Each belongs to
one test: it gets the job's config and mesh, and the test makes assertions about its result on rank 0."""

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh

from tests import masks
from train.config.schema import Config, Optimiser
from train.config.strategy import MESH_AXES
from train.config.world import World
from train.data.corpus import load_corpus
from train.measure.ledger import Ledger
from train.model.transformer import Transformer, dtypes
from train.ranks.distributed import own_rows
from train.ranks.side_group import SideGroup


def powersgd(config: Config, mesh: DeviceMesh) -> dict:
    """Gradients of the same batch at fixed weights in each step: first exact, then compressed with error feedback."""
    optim = dataclasses.replace(config.optim, name=Optimiser.sgd, weight_decay=0.0)
    config = dataclasses.replace(config, optim=optim)
    size = config.train.global_batch_size
    step = config.strategy.build(Transformer(config.model, **dtypes(config.precision)), mesh, config)
    batch = load_corpus(config).batch(1, size, own_rows(mesh, size))
    gradients: list[dict[str, torch.Tensor]] = []
    step.on_gradients = lambda: gradients.append({n: g.clone() for n, g in step.full_gradients() if g.ndim == 2})
    for _ in range(config.train.steps):
        step(*batch, lr=0.0)
    exact = gradients[0]

    def distance(found: dict[str, torch.Tensor]) -> float:
        return max(float((found[name] - g).norm() / g.norm()) for name, g in exact.items())

    compressed = gradients[config.strategy.powersgd_start_step :]  # type: ignore[attr-defined]
    means = [
        {name: torch.stack([g[name] for g in compressed[: k + 1]]).mean(0) for name in exact}
        for k in range(len(compressed))
    ]
    return {
        "before": [distance(g) for g in gradients[: len(gradients) - len(compressed)]],
        "each": [distance(g) for g in compressed],
        "running_mean": [distance(g) for g in means],
        "largest_rank": max(int(torch.linalg.matrix_rank(g, rtol=1e-9)) for g in compressed[0].values()),
    }


def dropout(config: Config, mesh: DeviceMesh) -> dict:
    """All dropout masks of some steps on every rank, with an evaluation after each step."""
    size = config.train.global_batch_size
    model = Transformer(config.model, **dtypes(config.precision))
    step = config.strategy.build(model, mesh, config)
    watch = masks.Watch()(model)
    corpus, rows = load_corpus(config), own_rows(mesh, size)
    drawn = []
    for i in range(1, config.train.steps + 1):
        step(*corpus.batch(i, size, rows), lr=1e-3)
        drawn.append(watch.take())
        step.evaluate(*corpus.batch(i, size, rows))
    trained = [mask for step_masks, _ in drawn for mask in step_masks]
    own = masks.Drawn(
        place={axis: mesh[axis].get_local_rank() for axis in MESH_AXES},
        steps=[torch.stack([mask.kept.flatten() for mask in step_masks]).numpy() for step_masks, _ in drawn],
        calls=[mask.place for mask in drawn[0][0]],
        recomputed=min(again for _, again in drawn),
        exact=all(mask.exact for mask in trained),
        replayed=all(mask.replayed for mask in trained),
        evaluated=watch.evaluated,
        changed_in_evaluation=watch.changed_in_evaluation,
    )
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    return masks.facts(ranks, config.model.dropout) if dist.get_rank() == 0 else {}


def waits(config: Config, mesh: DeviceMesh) -> dict:
    """The time-outs of all process groups that exist after a strategy was built."""
    config.strategy.build(Transformer(config.model, **dtypes(config.precision)), mesh, config)
    side_group = SideGroup(World(dist.get_rank(), 0, mesh.size(), mesh.size(), from_torchrun=True))
    side_group.barrier()  # a rank that ends now would break the connection that another one is still making
    groups = list(distributed_c10d._world.pg_map)
    waits = {group._get_backend(torch.device(mesh.device_type)).options._timeout.total_seconds() for group in groups}
    return {"groups": len(groups), "waits": sorted(waits)}


def held(config: Config, mesh: DeviceMesh) -> dict:
    """The bytes of state on each rank after two steps, by kind: what a run logs as `memory_by_rank/`."""
    size = config.train.global_batch_size
    step = config.strategy.build(Transformer(config.model, **dtypes(config.precision)), mesh, config)
    corpus = load_corpus(config)
    for i in (1, 2):
        step(*corpus.batch(i, size, own_rows(mesh, size)), lr=1e-3)
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, step.state_bytes())
    return {"held": ranks}


def evaluation(config: Config, mesh: DeviceMesh) -> dict:
    """The loss of one batch, evaluated several times, each time after a step that changes nothing."""
    size = config.train.global_batch_size
    step = config.strategy.build(Transformer(config.model, **dtypes(config.precision)), mesh, config)
    batch = load_corpus(config).batch(1, size, own_rows(mesh, size))
    trained, evaluated = [], []
    for _ in range(2):
        trained.append(float(step(*batch, lr=0.0).loss))
        evaluated.append(float(step.evaluate(*batch)[0]))
    return {"trained": trained, "evaluated": evaluated}


def autotp(config: Config, mesh: DeviceMesh) -> dict:
    """What the second step sends over `tp`, and how much parameters that should be equal differ between ranks."""
    size = config.train.global_batch_size
    model = Transformer(config.model, **dtypes(config.precision))
    step = config.strategy.build(model, mesh, config)
    corpus = load_corpus(config)
    step(*corpus.batch(1, size, own_rows(mesh, size)), lr=0.1)
    with Ledger(mesh) as ledger:
        step(*corpus.batch(2, size, own_rows(mesh, size)), lr=0.1)
    drift = 0.0
    for p in (p.detach() for p in model.parameters() if p not in step.cut):  # type: ignore[attr-defined]
        first = p.clone()
        dist.broadcast(first, group_src=0, group=mesh["tp"].get_group())
        drift = max(drift, float((p - first).abs().max()))
    drifts = [0.0] * dist.get_world_size()
    dist.all_gather_object(drifts, drift)
    sent = {f"{axis}/{op}": [total.calls, total.bytes] for (axis, op), total in ledger.totals.items()}
    return {"sent": sent, "drift": max(drifts), "cut": len(step.cut)}  # type: ignore[attr-defined]
