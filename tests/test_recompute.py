"""What activation checkpointing keeps of a layer that is compiled."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from train.config.schema import ActivationCheckpointing
from train.strategies.recompute.apply import apply_checkpointing


@torch.library.custom_op("test_recompute::exchanged", mutates_args=())
def exchanged(x: Tensor) -> Tensor:
    return x.clone()


@exchanged.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Exchange(torch.autograd.Function):
    """What a collective of the lab is: an operator that no compiler knows, in an autograd function."""

    @staticmethod
    def forward(ctx, x):
        return exchanged(x)

    @staticmethod
    def backward(ctx, grad):
        return exchanged(grad)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x):
        return x + self.second(Exchange.apply(self.first(x)).sin())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own code, which it compiles
@pytest.mark.parametrize(("mode", "activations"), [("none", 3), ("selective", 2), ("full", 1)])
def test_what_is_kept(mode, activations):
    """Full recomputation keeps the input. Without its contexts, torch 2.11 keeps the exchanged tensor too."""
    torch.manual_seed(0)
    layer, x = Layer(), torch.randn(16, 8, requires_grad=True)
    expected = torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])
    apply_checkpointing(layer, ActivationCheckpointing(mode), compiled=True)
    forward = torch.compile(layer.forward, backend="aot_eager_decomp_partition")
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        y = forward(x)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), [x, *layer.parameters()]), expected)
    assert len({tensor.data_ptr() for tensor in kept if tensor.shape == x.shape}) == activations
