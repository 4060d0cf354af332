"""Bugs of expert parallelism and of balancing."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tests.planted.base import Counter
from train.model.moe import Experts, Router
from train.strategies.data import apply as data
from train.strategies.expert import apply as expert
from train.strategies.tensor import apply as tensor


@contextmanager
def expert_gradients_times_ep(counter: Counter) -> Iterator[None]:
    """The gradients of experts are complete after the backward of the all-to-all, but are multiplied by `ep` again."""
    original = data.sum_gradients

    def sum_gradients(model: nn.Module) -> None:
        original(model)
        for module in model.modules():
            if isinstance(module, Experts):
                assert isinstance(module.gate, DTensor) and isinstance(module, FSDPModule)
                counter.calls += 1
                ep = module.gate.device_mesh["ep"].size()
                module.set_gradient_divide_factor(1.0 / ep)

    with mock.patch.object(data, "sum_gradients", sum_gradients):
        yield


@contextmanager
def aux_loss_of_local_sequences(counter: Counter) -> Iterator[None]:
    """The auxiliary loss is divided by the number of sequences of this data rank, not of the global batch."""
    original = expert.scale_aux_loss

    def scale_aux_loss(model: Any, *, num_sequences: int) -> None:
        counter.calls += 1
        original(model, num_sequences=num_sequences // 2)

    with mock.patch.object(expert, "scale_aux_loss", scale_aux_loss):
        yield


@contextmanager
def aux_loss_on_every_tp_rank(counter: Counter) -> Iterator[None]:
    """Every tp rank adds the full auxiliary loss to the sum of the router's gradient."""
    original = tensor.split_mixture

    def split_mixture(moe: Any, mesh: Any, dim: int | None) -> None:
        counter.calls += 1
        scale = moe.router.aux_scale
        original(moe, mesh, dim)
        moe.router.aux_scale = scale

    with mock.patch.object(tensor, "split_mixture", split_mixture):
        yield


@contextmanager
def first_expert_ranked_higher(counter: Counter) -> Iterator[None]:
    """The first expert is chosen as if its score were higher by 0.05. The gates are those of the scores themselves."""
    original = Router.choose

    def choose(self: Any, x_BTD: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        counter.calls += 1
        bias, self.bias = self.bias, self.bias.clone()
        self.bias[0] += 0.05
        try:
            return original(self, x_BTD, weight)
        finally:
            self.bias = bias

    with mock.patch.object(Router, "choose", choose):
        yield


BUGS = (
    expert_gradients_times_ep,
    aux_loss_of_local_sequences,
    aux_loss_on_every_tp_rank,
    first_expert_ranked_higher,
)
