"""Run steps of a rank with fake tensors on a fake process group, and print the memory at the peak as lines of JSON.

argv: a file with a JSON list of {"overrides": […], "world_size": N, "rank": R}. The real strategy code runs. What it
needs of other ranks is imitated as in tests/fake_worker.py, and kernels of CUDA as in tests/dry_kernels.py.
"""

import json
import sys
import time
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed import device_mesh
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining.schedules import _PipelineSchedule
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.dry_kernels import imitated
from tests.dry_memory import Memory
from tests.fake_worker import answered, summed
from train.command.cli import configured
from train.model.transformer import Transformer, dtypes
from train.ranks import collectives
from train.ranks.distributed import Runtime, build_mesh, own_rows
from train.strategies.data.apply import Replica

STEPS = 2  # the first makes the optimiser's state, and a pipeline's buffers
# these look at the numbers of ranks, which fake tensors do not have
MESHES = ("__init__", "_flatten", "_unflatten", "__getitem__", "_get_all_submeshes")


def dry_run(overrides: list[str], world_size: int, rank: int) -> dict[str, Any]:
    config = configured(overrides)
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    memory = Memory()
    try:
        _clear_sharding_prop_cache()
        mesh = build_mesh(config, Runtime(torch.device("cpu"), "fake"))
        with FakeTensorMode(allow_non_fake_inputs=True), imitated(), memory.recording():
            step: Any = config.strategy.build(Transformer(config.model, **dtypes(config.precision)), mesh, config)
            memory.watch_logits(step.model)
            for parameter in step.parameters.values():
                parameter.register_post_accumulate_grad_hook(lambda p: memory.name([p.grad], "gradients"))
            step.on_gradients = lambda: memory.name([p.grad for p in step.parameters.values()], "gradients")
            rows = own_rows(mesh, config.train.global_batch_size)
            batch = [torch.zeros(rows.stop - rows.start, config.train.seq_len, dtype=torch.long) for _ in range(2)]
            memory.kind = "temporary"
            for _ in range(STEPS):
                start = len(memory.events)
                step(*batch, lr=1e-3)
                memory.rename("temporary", "pipeline")
            memory.name(step.parameters.values(), "parameters")
            memory.name(step.state_tensors()["optimiser"], "optimiser")
        kinds, whats = memory.peak(start)
        return {"kinds": kinds, "whats": dict(whats.most_common(40)), "state": step.state_bytes()}
    finally:
        dist.destroy_process_group()


def on_meta(model, *args, make=Transformer.__init__, **options):
    """A model on the meta device, made of no fake tensors, because torch cannot convert those in place."""
    with unset_fake_temporarily():
        make(model, *args, **options)
    model.rope = torch.empty(model.rope.shape, dtype=model.rope.dtype)


def outside(call):
    """The call with real tensors."""

    def called(*args, **options):
        with unset_fake_temporarily():
            return call(*args, **options)

    return called


class KeepsBuckets:
    """A reducer of DDP whose buckets stay as they are. To form them anew, it reads a tensor that is fake here."""

    def __init__(self, reducer):
        self.reducer = reducer

    def __getattr__(self, name):
        return getattr(self.reducer, name)

    def _rebuild_buckets(self):
        return False


def keep_buckets(replica, *args, init=Replica._ddp_init_helper, **options):
    init(replica, *args, **options)
    replica.reducer = KeepsBuckets(replica.reducer)


def played():
    """What stands for the other ranks, and for real numbers."""
    for name in MESHES:
        yield mock.patch.object(DeviceMesh, name, outside(getattr(DeviceMesh, name)))
    yield mock.patch.object(DeviceMesh, "_concatenate", staticmethod(outside(DeviceMesh._concatenate)))
    make_mesh = outside(device_mesh.init_device_mesh)
    yield mock.patch("train.strategies.expert.apply.init_device_mesh", make_mesh)
    if hasattr(_PipelineSchedule, "_warmup_p2p"):  # torch 2.13: ranks agree on something
        yield mock.patch.object(_PipelineSchedule, "_warmup_p2p", outside(_PipelineSchedule._warmup_p2p))
    yield mock.patch.object(Transformer, "__init__", on_meta)
    yield mock.patch.object(Replica, "_ddp_init_helper", keep_buckets)
    yield mock.patch.object(dist, "all_reduce", summed)
    yield mock.patch.object(dist, "recv", lambda tensor, **_: tensor.fill_(1))
    yield mock.patch.object(collectives, "exchange", answered)


def main():
    with ExitStack() as stack:
        for patch in played():
            stack.enter_context(patch)
        for job in json.loads(Path(sys.argv[1]).read_text()):
            started = time.perf_counter()
            try:
                result = dry_run(**job)
            except Exception:
                result = {"error": traceback.format_exc()}
            print(json.dumps(job | result | {"seconds": round(time.perf_counter() - started, 1)}), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
