"""Each rank of a test world trains a few steps, and then compares its copies of shared KV heads bitwise with those of
the other ranks."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from train.data.corpus import load_corpus
from train.model.transformer import Transformer, dtypes
from train.proof import jobs
from train.ranks.distributed import own_rows
from train.ranks.gradients import local

STEPS = 3


def run(job: jobs.Job, site: jobs.Site) -> jobs.Result:
    """`compared`: weights and moments that two or more ranks have. `unequal`: those that differ on any of them."""
    config = job.config
    mesh = site.mesh(config)
    step = config.strategy.build(Transformer(config.model, **dtypes(config.precision)), mesh, config)
    size = config.train.global_batch_size
    for i in range(1, STEPS + 1):
        step(*load_corpus(config).batch(i, size, own_rows(mesh, size)), lr=1e-2)
    optimiser = step.optimiser  # type: ignore[attr-defined]
    counts = torch.zeros(2, dtype=torch.long)
    for name, p in optimiser.parameters.items():
        if isinstance(p, DTensor) and "kv_replicate" in (p.device_mesh.mesh_dim_names or ()):
            moments = [x for x in optimiser.inner.state[optimiser.shards[name]].values() if x.ndim]
            group = p.device_mesh.get_group("kv_replicate")
            for held in (local(p).detach(), *moments):
                counts += torch.tensor([1, differs(held, group)])
    dist.all_reduce(counts)
    return {"compared": int(counts[0]), "unequal": int(counts[1])}


def differs(held: Tensor, group: dist.ProcessGroup) -> bool:
    others = [torch.empty_like(held) for _ in range(group.size())]
    dist.all_gather(others, held.contiguous(), group=group)
    return not all(torch.equal(other, held) for other in others)
