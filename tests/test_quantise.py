"""Quantisation-aware training: it rounds as torchao does when it converts, and learns to live with it."""

import warnings

import pytest
import torch
from torch import nn

from tests.refused import assert_refused_with_a_fix
from train.model.transformer import Linear
from train.strategies.quantise.apply import RoundedLinear
from train.strategies.quantise.rounding import rounded_activation, rounded_weight


def converted(weight: torch.Tensor) -> nn.Module:
    """A linear layer with this weight that torchao has converted to 8da4w."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao 0.18 loads kernels of other machines, and says that it cannot
        quantization = pytest.importorskip("torchao.quantization")
        granularity = pytest.importorskip("torchao.quantization.granularity")
        mapping = pytest.importorskip("torchao.quantization.quant_primitives").MappingType.SYMMETRIC_NO_CLIPPING_ERR
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data.copy_(weight)
    layer = nn.Sequential(linear)
    config = quantization.Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4,  # type: ignore[attr-defined]
        weight_granularity=granularity.PerGroup(32),
        weight_mapping_type=mapping,
    )
    quantization.quantize_(layer, config)
    return layer


def test_it_computes_what_the_converted_layer_computes():
    generator = torch.Generator().manual_seed(0)
    layer = Linear(128, 64)
    with torch.no_grad():
        layer.weight.normal_(0, 0.1, generator=generator)[3].zero_()  # a group without a range
    x = torch.randn(2, 7, 128, generator=generator)
    x[0, 0] = 0.0
    x[0, 1] = x[0, 1].abs() + 1  # 0 is outside the range of this token's features
    layer.__class__ = RoundedLinear
    with torch.no_grad():
        assert torch.equal(layer(x), converted(layer.weight)(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_few_steps_and_a_gradient_that_passes(dtype):
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    for rounded, most in ((rounded_weight(x), 16), (rounded_activation(x), 256)):
        assert rounded.dtype is dtype
        assert all(len(group.unique()) <= most for group in rounded.unflatten(-1, (-1, 32)).flatten(0, 1))
        (grad,) = torch.autograd.grad(rounded.sum(), x)
        apart, step = (rounded - x).detach().abs().max(), float(x.detach().max() - x.detach().min()) / (most - 1)
        assert apart < step
        outside = grad == 0  # the largest number of a group or a token can be rounded to a step that there is not
        assert outside.sum() <= 6 and ((grad - 1).abs()[~outside] < 1e-2).all()


@pytest.mark.parametrize(
    ("line", "size", "rule"),
    [
        ("strategy=tp", 2, "qat_tokens"),
        ("strategy=ds_autotp", 2, "ds_qat"),
        ("strategy=fsdp model.ffn_dim=48", 2, "qat_groups"),
        ("strategy=fsdp model=moe_tiny model.num_shared_experts=1 model.expert_ffn_dim=48", 2, "qat_groups"),
    ],
)
def test_what_it_cannot_do_is_refused_with_a_fix(line, size, rule):
    assert_refused_with_a_fix([*line.split(), "train.qat=8da4w"], size, rule)
