"""precision=fp8: the products are those of the numbers that e4m3 and e5m2 have, with scales that are powers of two."""

import copy
import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.refused import assert_refused_with_a_fix
from tests.rows.base import configured
from tests.targets import target
from train.config.schema import Fp8Scaling
from train.model.transformer import CrossEntropy, Linear, Transformer, dtypes
from train.ranks.quiet import quiet_torchao
from train.strategies.float8.rules import FP8_SINCE

quiet_torchao()
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def rounded(x: Tensor, dtype: torch.dtype, *, dim: int | None) -> Tensor:
    """x as `dtype` has it, in float32: the largest number of the matrix, or of each slice along `dim`, is scaled by a
    power of two to at most the largest of `dtype`."""
    x = x.float()
    largest = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = torch.exp2(torch.floor(torch.log2(torch.finfo(dtype).max / largest)))
    return (x * scale).to(dtype).float() / scale


def layer(scaling: str) -> tuple[Linear, Tensor, Tensor]:
    """A layer of 8-bit products, its input and the gradient of its output."""
    from train.strategies.float8.apply import apply_float8

    config = configured(["strategy=single", "precision=fp8", f"train.fp8_scaling={scaling}", "model.num_layers=1"])
    model = Transformer(config.model, **dtypes(config.precision))
    apply_float8(target(model, config))
    block: Any = model.layers["0"]
    made = block.feed_forward.down
    made.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        made.weight.normal_(0, 0.1, generator=generator)
    x = torch.randn(2, 16, made.in_features, generator=generator) * torch.logspace(-2, 2, 16)[:, None]
    grad = torch.randn(2, 16, made.out_features, generator=generator) * 1e-3
    return made, x.bfloat16().requires_grad_(), grad.bfloat16()


@pytest.mark.parametrize("scaling", [one.value for one in Fp8Scaling])
def test_products_are_those_of_rounded_numbers(scaling):
    by_row, of_gradients = scaling == "rowwise", E4M3 if scaling == "rowwise" else E5M2
    made, x, grad = layer(scaling)
    out = made(x)
    out.backward(grad)
    weight, inputs, grads = made.weight.detach().bfloat16(), x.detach().flatten(0, 1), grad.flatten(0, 1)

    def dims(first: int, second: int) -> tuple[int | None, int | None]:
        return (first, second) if by_row else (None, None)

    def product(a: Tensor, b: Tensor, a_dtype: torch.dtype, first: int | None, second: int | None) -> Tensor:
        return rounded(a, a_dtype, dim=first) @ rounded(b, E4M3, dim=second)

    expected = {
        "out": product(inputs, weight.T, E4M3, *dims(1, 0)),
        "inputs": product(grads, weight, of_gradients, *dims(1, 0)),
        "weight": product(grads.T, inputs, of_gradients, *dims(1, 0)),
    }
    assert x.grad is not None and made.weight.grad is not None
    found = {"out": out.detach().flatten(0, 1), "inputs": x.grad.flatten(0, 1), "weight": made.weight.grad}
    for name, value in expected.items():
        error = (found[name].float() - value).norm() / value.norm()
        assert error < 4e-3, f"{name}: more than the rounding of the result to bf16"
    whole = inputs.float() @ weight.T.float()
    assert (found["out"].float() - whole).norm() / whole.norm() > 1e-2, "nothing was rounded to 8 bits"


def test_only_linear_layers_of_blocks_are_changed():
    from train.strategies.float8.apply import Float8Linear, apply_float8

    config = configured(["strategy=single", "precision=fp8", "model=moe_tiny", "model.num_layers=2"])
    model = Transformer(config.model, **dtypes(config.precision))
    before = [name for name, _ in model.named_parameters()]
    apply_float8(target(model, config))
    changed = {name for name, module in model.named_modules() if isinstance(module, Float8Linear)}
    assert {name.split(".", 2)[2].split(".")[0] for name in changed} == {"attention", "feed_forward"}
    assert not any("router" in name or "experts" in name.replace("shared_experts", "") for name in changed), changed
    assert [name for name, _ in model.named_parameters()] == before and type(model.head) is Linear


@pytest.mark.parametrize(
    ("line", "size", "rule"),
    [
        ("strategy=tp", 2, "fp8_weights"),
        ("strategy=ds_zero1", 2, "ds_precision"),
        ("strategy=dp model.ffn_dim=344", 2, "fp8_sides"),
        ("strategy=cp train.seq_len=24 train.micro_batch_size=1", 2, "fp8_sides"),
        ("strategy=dp train.qat=8da4w", 2, "fp8_qat"),
    ],
)
def test_what_it_cannot_do_is_refused_with_a_fix(line, size, rule):
    assert_refused_with_a_fix([*line.split(), "precision=fp8"], size, rule)


@pytest.mark.parametrize("scaling", [one.value for one in Fp8Scaling])
def test_products_are_torchaos(scaling):
    from torchao.float8 import Float8LinearConfig
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args
    from torchao.float8.float8_training_tensor import LinearMMConfig, ScaledMMConfig

    made, x, grad = layer(scaling)
    with torch.no_grad():
        x[0, 3], grad[1, 2] = 0, 0
    recipe = Float8LinearConfig.from_recipe_name(scaling)
    recipe = dataclasses.replace(recipe, round_scales_to_power_of_2=True, emulate=True)
    weight = made.weight.detach().bfloat16().requires_grad_()
    theirs = x.detach().requires_grad_()
    products = LinearMMConfig(*(ScaledMMConfig(True, fast, False, False) for fast in (True, False, False)))
    expected = matmul_with_hp_or_float8_args.apply(theirs, weight.t(), products, recipe)
    expected.backward(grad)
    out = made(x)
    out.backward(grad)
    assert x.grad is not None and made.weight.grad is not None and theirs.grad is not None and weight.grad is not None
    assert torch.equal(out, expected)
    assert torch.equal(x.grad, theirs.grad) and torch.equal(made.weight.grad.bfloat16(), weight.grad)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_a_scale_is_the_largest_power_of_two_that_fits(dtype):
    from train.strategies.float8.product import exponent_of_scale, power_of_two

    most = torch.finfo(dtype).max
    edges = [most * 2.0**e for e in (-20, -3, 0, 1, 90)]
    largest = torch.tensor([*edges, *(math.nextafter(x, math.inf) * (1 + 2**-20) for x in edges), 1.0, 1.5, 3e38])
    scale = power_of_two(exponent_of_scale(largest, dtype))
    assert (largest.double() * scale.double() <= most).all() and (largest.double() * scale.double() * 2 > most).all()
    assert (power_of_two(-exponent_of_scale(largest, dtype)).double() * scale.double() == 1).all()
    assert exponent_of_scale(torch.zeros(1), dtype) == math.floor(math.log2(most / 1e-12))  # as in torchao


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("scaling", [one.value for one in Fp8Scaling])
def test_what_is_not_finite_stays_so(scaling, bad):
    made, x, grad = layer(scaling)
    with torch.no_grad():
        x[0, 3, 5] = bad
    out = made(x)
    assert not out[0, 3].isfinite().any() and (scaling == "rowwise") == bool(out[1].isfinite().all())
    out.backward(grad)
    assert made.weight.grad is not None and not made.weight.grad[:, 5].isfinite().any()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own code, which it compiles
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("scaling", [one.value for one in Fp8Scaling])
def test_a_gpu_multiplies_the_same_numbers(scaling, compiled):
    from train.strategies.compile.apply import compile_blocks
    from train.strategies.float8.apply import Float8Linear

    if torch.cuda.get_device_capability() < FP8_SINCE:
        pytest.skip("needs a GPU that multiplies 8-bit numbers")
    made, x, grad = layer(scaling)
    made(x).backward(grad)
    assert isinstance(made, Float8Linear) and x.grad is not None and made.weight.grad is not None
    there = copy.deepcopy(made).cuda()
    there.zero_grad()
    moved = x.detach().cuda().requires_grad_()
    if compiled:
        config = configured(["strategy=single", "precision=fp8", "compile.enabled=true"])
        model = SimpleNamespace(layers={"0": there}, loss=CrossEntropy())
        compile_blocks(target(model, config, "cuda"))
    out = there(moved)
    out.backward(grad.cuda())
    assert moved.grad is not None and there.weight.grad is not None
    pairs = [(made(x), out), (x.grad, moved.grad), (made.weight.grad, there.weight.grad)]
    for here, other in pairs:
        assert (here - other.cpu()).norm() / here.norm() < 6e-3
