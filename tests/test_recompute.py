"""What activation checkpointing keeps of a layer that is compiled."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from tests.rows.base import configured
from train.command import cli
from train.config.plan import Plan
from train.config.problems import BadInput
from train.config.schema import ActivationCheckpointing
from train.strategies.recompute.apply import apply_checkpointing
from train.strategies.recompute.rules import check_device, compiled_on_cpu


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


FULL = "strategy=tp compile.enabled=true train.activation_checkpointing=full"


@pytest.mark.parametrize(
    ("line", "refused"),
    [
        (FULL, True),
        (FULL.replace("full", "selective"), False),
        (FULL.replace("full", "selective") + " model.dropout=0.1", True),
        (FULL.replace("strategy=tp", "strategy=fsdp"), False),
        (FULL.replace("compile.enabled=true", ""), False),
    ],
)
def test_what_torch_cannot_compile_for_a_cpu_is_refused_there(line, refused):
    on_cpu, unknown = (configured([*line.split(), f"runtime.device={device}"]) for device in ("cpu", "auto"))
    found = [problem for problem in cli.problems(on_cpu, 2) if problem.rule == "recompute_compiled"]
    assert len(found) == refused and not cli.problems(unknown, 2)
    if refused:
        mended = Plan(on_cpu, 2).override(found[0].overrides[0])
        assert not cli.problems(mended.config, 2)
        with pytest.raises(BadInput, match="is not compiled for a CPU"):
            check_device(Plan(unknown, 2), "cpu")
        broken = compiled_on_cpu(Plan(on_cpu, 2))
        assert broken is not None
        for fix in broken.fixes:
            assert not cli.problems(Plan(on_cpu, 2).override(fix).config, 2), fix
    check_device(Plan(unknown, 2), "cuda")
