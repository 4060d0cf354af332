"""Published bugs of the update: gradients, norm and activations are right, and yet the weights or the log are wrong."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist

from tests.museum.base import after, replaced
from tests.planted.base import Counter
from train import step
from train.config.plan import Plan
from train.ranks import optim
from train.ranks.gradients import local

Planted = AbstractContextManager[None]
LATE = "layers.1.feed_forward.up.weight"  # whose update arrives too late for the next forward


def only_first_rank_updates(counter: Counter) -> Planted:
    """After the update each rank copies its part of the new weights back, but all except the first look for it in a
    wrong place: their parts of the weights keep the old values."""

    def make(original: Any) -> Any:
        @torch.no_grad()
        def update(self: Any, lr: float) -> None:
            old = [local(p).clone() for p in self.parameters.values()]
            original(self, lr)
            if dist.get_rank() > 0:
                counter.calls += 1
                for p, value in zip(self.parameters.values(), old, strict=True):
                    local(p).copy_(value)

        return update

    return replaced(optim.ShardOptimiser, "step", make)


@contextmanager
def forward_with_old_weights(counter: Counter) -> Iterator[None]:
    """The weights are gathered while the next forward already runs. One matrix is used before its gather has ended: its
    forward and backward use the weights of the step before."""

    def make_call(original: Any) -> Any:
        def call(self: Any, tokens: Any, targets: Any, *, lr: float) -> Any:
            with torch.no_grad():
                self.arriving = local(self.parameters[LATE]).clone()
                if hasattr(self, "before"):
                    counter.calls += 1
                    local(self.parameters[LATE]).copy_(self.before)
                self.before = self.arriving
            return original(self, tokens, targets, lr=lr)

        return call

    def make_update(original: Any) -> Any:
        def update(self: Any, *args: Any) -> Any:
            with torch.no_grad():
                local(self.parameters[LATE]).copy_(self.arriving)
            return original(self, *args)

        return update

    with replaced(step.Step, "__call__", make_call), replaced(step.Step, "update", make_update):
        yield


def gradients_kept_after_the_update(counter: Counter) -> Planted:
    """The gradients are not set to zero after an update, so every step adds to those of all steps before."""

    def make(original: Any) -> Any:
        def update(self: Any, lr: float) -> None:
            counter.calls += 1
            kept = [p.grad for p in self.parameters.values()]
            original(self, lr)
            for p, grad in zip(self.parameters.values(), kept, strict=True):
                p.grad = grad

        return update

    return replaced(optim.ShardOptimiser, "step", make)


@contextmanager
def norm_logged_times_microbatches(counter: Counter) -> Iterator[None]:
    """The norm is right where gradients are clipped, but is logged as the sum over the microbatches of the same
    number."""

    def init(self: Any, model: Any, mesh: Any, config: Any, *args: Any, **options: Any) -> None:
        self.num_microbatches = Plan(config, mesh.size()).num_microbatches

    def make(original: Any) -> Any:
        def update(self: Any, *args: Any) -> Any:
            counter.calls += 1
            return original(self, *args) * self.num_microbatches

        return update

    with after(step.Step, "__init__", init), replaced(step.Step, "update", make):
        yield


def everything_decays(counter: Counter) -> Planted:
    """All parameters are in one group of the optimiser, so that weight decay also applies to the norms."""

    def decays(parameter: Any) -> bool:
        counter.calls += 1
        return True

    return replaced(optim, "decays", lambda original: decays)


BUGS = (
    only_first_rank_updates,
    forward_with_old_weights,
    gradients_kept_after_the_update,
    norm_logged_times_microbatches,
    everything_decays,
)
