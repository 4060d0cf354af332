"""Run the step of a rank with fake tensors on a fake process group, and print the memory of each job as a line of JSON.

argv: a file with a JSON list of {"overrides": […], "world_size": N, "rank": R}.
"""

import json
import sys
import time
import traceback
from contextlib import ExitStack
from pathlib import Path
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
from train.strategies.data.apply import Replica
from train.ranks.distributed import Runtime, build_mesh, own_rows

STEPS = 2  # the first makes the optimiser's state


def dry_run(overrides, world_size, rank):
    config = configured(overrides)
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        _clear_sharding_prop_cache()
        mesh = build_mesh(config, Runtime(torch.device("cpu"), "fake"))
        with FakeTensorMode(allow_non_fake_inputs=True) as fake, imitated():
            memory = Memory()
            with memory.recording():
                step = config.strategy.build(Transformer(config.model, **dtypes(config.precision)), mesh, config)
                memory.watch_logits(step.model)
                for p in step.parameters.values():
                    p.register_post_accumulate_grad_hook(lambda p: memory.name([p.grad], "gradients"))
                rows = own_rows(mesh, config.train.global_batch_size)
                batch = [torch.zeros(rows.stop - rows.start, config.train.seq_len, dtype=torch.long) for _ in range(2)]
                memory.kind = "temporary"
                for _ in range(STEPS):
                    start = len(memory.events)
                    step.on_gradients = lambda: memory.name((p.grad for p in step.parameters.values()), "gradients")
                    step(*batch, lr=1e-3)
                memory.name(step.parameters.values(), "parameters")
                memory.name(step.state_tensors()["optimiser"], "optimiser")
            total, kinds, whats = memory.peak(start)
            import os
            if os.environ.get("TRACE"):
                ids = {}
                ev = [[ids.setdefault(id(b), len(ids)), d] for b, d in memory.events]
                bl = {}
                for b, _ in memory.events: bl[ids[id(b)]] = [b.kind, b.what]
                import hashlib; name = overrides[0].split("=")[1] + "_" + "_".join(o.split("=")[1] for o in overrides[1:]) + f"_{rank}"
                Path(os.environ["TRACE"], name + ".json").write_text(json.dumps({"overrides": overrides, "world_size": world_size, "rank": rank, "start": start, "events": ev, "blocks": bl}))
            return {"total": total, "kinds": kinds, "state": step.state_bytes(), "whats": dict(whats.most_common(60))}
    finally:
        dist.destroy_process_group()


def on_meta(model, *args, make=Transformer.__init__, **options):
    """A model on the meta device, made of no fake tensors: torch cannot convert those in place."""
    with unset_fake_temporarily():
        make(model, *args, **options)
    model.rope = torch.empty(model.rope.shape, dtype=model.rope.dtype)


def outside(call):
    """The call with real tensors: it looks at the numbers of ranks."""

    def called(*args, **options):
        with unset_fake_temporarily():
            return call(*args, **options)

    return called


MESHES = [(DeviceMesh, name) for name in ("__init__", "_flatten", "_unflatten", "__getitem__", "_get_all_submeshes", "_compute_coordinate_on_dim")]


class KeepsBuckets:
    """A reducer of DDP whose buckets stay as they are. To form them anew, it reads a tensor of C++'s, which is fake."""

    def __init__(self, reducer):
        self.reducer = reducer

    def __getattr__(self, name):
        return getattr(self.reducer, name)

    def _rebuild_buckets(self):
        return False


def keep_buckets(replica, *args, init=Replica._ddp_init_helper, **options):
    init(replica, *args, **options)
    replica.reducer = KeepsBuckets(replica.reducer)


def main():
    with ExitStack() as played:
        played.enter_context(mock.patch.object(Transformer, "__init__", on_meta))
        for owner, name in MESHES:
            played.enter_context(mock.patch.object(owner, name, outside(getattr(owner, name))))
        played.enter_context(mock.patch.object(DeviceMesh, "_concatenate", staticmethod(outside(DeviceMesh._concatenate))))
        played.enter_context(mock.patch("train.strategies.expert.apply.init_device_mesh", outside(device_mesh.init_device_mesh)))
        played.enter_context(mock.patch.object(_PipelineSchedule, "_warmup_p2p", outside(_PipelineSchedule._warmup_p2p)))
        played.enter_context(mock.patch.object(Replica, "_ddp_init_helper", keep_buckets))
        played.enter_context(mock.patch.object(dist, "all_reduce", summed))
        played.enter_context(mock.patch.object(dist, "recv", lambda tensor, **_: tensor.fill_(1)))
        played.enter_context(mock.patch.object(collectives, "exchange", answered))
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
