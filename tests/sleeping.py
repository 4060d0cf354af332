"""A transformer whose layers sleep instead of computing, so that its time does not depend on the number of cores. Steps
of it are recorded on every rank.

A layer's forward, the gradient of its input and the gradient of its weights take one unit each.
"""

import time
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from train.config.schema import Config
from train.data.corpus import load_corpus
from train.measure import sampling
from train.measure.sampling import Sampler
from train.model import transformer as model_file
from train.model.spans import span
from train.model.transformer import Transformer, dtypes
from train.proof.jobs import Site
from train.ranks.distributed import own_rows
from train.ranks.gradients import local
from train.ranks.side_group import SideGroup


class _Sleep(torch.autograd.Function):
    """Returns the input after `forward_s` seconds, and its gradient after `backward_s` seconds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward_s: float, backward_s: float) -> Tensor:
        time.sleep(forward_s)
        ctx.seconds = backward_s
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.seconds)
        return grad, None, None


@contextmanager
def layers(unit_s: float, slow_layer: str = ""):
    """Let the layers sleep. `slow_layer`: the forward of this layer takes two units."""

    def forward(block: model_file.Block, x_BTD: Tensor, rope: Tensor) -> Tensor:
        weight = _Sleep.apply(local(block.feed_forward_norm.weight), 0, unit_s)
        return _Sleep.apply(x_BTD, unit_s * (2 if block.name == slow_layer else 1), unit_s) + 0 * weight

    original = model_file.Transformer.__init__

    def named(self: Transformer, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        layers: Any = self.layers
        for name, block in layers.items():
            block.name = name

    with mock.patch.object(model_file.Block, "forward", forward), mock.patch.object(Transformer, "__init__", named):
        yield


def record(config: Config, site: Site) -> dict[str, Any]:
    """The tags and samples of the shortest step on rank 0, without the first step. The shortest is chosen because other
    load of the machine can only make a step longer."""
    mesh = site.mesh(config)
    step = config.strategy.build(Transformer(config.model, **dtypes(config.precision)), mesh, config)
    sampler = Sampler(config, mesh, site.runtime.device, step, SideGroup(site.world))
    corpus, size = load_corpus(config), config.train.global_batch_size
    found = []
    for i in range(1, config.train.steps + 1):
        with mock.patch.object(sampling, "FIRST", 2), sampler.watch(i):
            with span("data"):
                batch = corpus.batch(i, size, own_rows(mesh, size))
            step(*batch, lr=0.0)
        found.append(sampler.collect(i))
    if site.world.rank > 0:
        return {}
    best = min(found[1:], key=lambda sampled: sampled.values["time/step_ms"])
    return {"values": best.values, "ranks": best.ranks}
