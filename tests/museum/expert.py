"""Published bugs of mixtures of experts: gradients of experts and routers, the auxiliary loss, balancing."""

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from tests.museum.base import after, replaced
from tests.planted.base import Counter
from train import step
from train.model.moe import Experts, Router, routers
from train.ranks import gradients
from train.ranks.gradients import local
from train.strategies.expert import apply as expert
from train.strategies.expert import balance

Planted = AbstractContextManager[None]


def router_learns_from_the_auxiliary_loss_only(counter: Counter) -> Planted:
    """The gates travel to the experts' ranks through a gather that autograd does not follow: the main loss gives the
    router no gradient, and only the auxiliary loss trains it."""

    def detach(module: Any, args: Any, output: Any) -> None:
        gates, _ = output
        if gates.requires_grad:
            counter.calls += 1
            gates.register_hook(torch.zeros_like)

    def apply_experts(target: Any) -> None:
        for router in routers(target.model.layers).values():
            router.register_forward_hook(detach)

    return after(expert, "apply_experts", apply_experts)


def doubled_by_every_microbatch(counter: Counter) -> Planted:
    """If no other rank has the same experts, the buffer for the reduced gradients is the buffer of the gradients, and
    is added to itself after every microbatch: m microbatches give the first one the weight 2^(m-1)."""

    def make(original: Any) -> Any:
        def microbatch(wrapped: Any, *args: Any, **options: Any) -> Any:
            experts = [module for module in wrapped.modules() if isinstance(module, Experts)]
            for grad in (p.grad for module in experts for p in module.parameters() if p.grad is not None):
                counter.calls += 1
                local(grad).mul_(2)
            return original(wrapped, *args, **options)

        return microbatch

    return replaced(step, "microbatch", make)


def experts_counted_on_one_tensor_rank(counter: Counter) -> Planted:
    """The norm takes the experts' gradients for copies that all ranks of the dense tp group have, and counts those of
    the first rank only."""

    def make(original: Any) -> Any:
        def global_norm(grads: Any, *args: Any) -> Any:
            grads = list(grads)
            for i, grad in enumerate(grads):
                if isinstance(grad, DTensor) and grad.ndim == 3 and grad.device_mesh.get_local_rank("tp") > 0:
                    counter.calls += 1
                    grads[i] = grad * 0.0
            return original(grads, *args)

        return global_norm

    return replaced(gradients, "global_norm", make)


@contextmanager
def balanced_after_every_microbatch(counter: Counter) -> Iterator[None]:
    """The biases that balance the experts are moved after every microbatch, by the counts of this microbatch and of
    this rank, not once per step by the counts of the global batch."""

    def init(self: Any, model: Any, mesh: Any, config: Any) -> None:
        for router in self.routers.values():
            router.own_rate = config.model.bias_update_rate
        self.model = dataclasses.replace(config.model, bias_update_rate=0.0)

    def note(self: Any, place: Any, aux: Any, num_chosen_E: Any, *args: Any) -> None:
        counter.calls += 1
        self.bias += self.own_rate * (num_chosen_E.double().mean() - num_chosen_E).sign()

    with after(balance.LoadBalance, "__init__", init), after(Router, "note", note):
        yield


def auxiliary_loss_divided_by_cp(counter: Counter) -> Planted:
    """The main loss is multiplied by `cp`, because gradients are averaged over `cp`, but the auxiliary loss is not: it
    is `cp` times too weak."""

    def apply_experts(target: Any) -> None:
        for router in routers(target.model.layers).values():
            counter.calls += 1
            router.aux_scale /= target.mesh["cp"].size()

    return after(expert, "apply_experts", apply_experts)


BUGS = (
    router_learns_from_the_auxiliary_loss_only,
    doubled_by_every_microbatch,
    experts_counted_on_one_tensor_rank,
    balanced_after_every_microbatch,
    auxiliary_loss_divided_by_cp,
)
