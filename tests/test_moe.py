"""Mixtures of experts on one device: the mathematics, the counting, the kernels."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from tests.test_model import CPU, build, config
from train.config.flops import matmul_parameters
from train.config.schema import ActivationCheckpointing, Precision
from train.model.moe import Experts, Router, gather_rows, routers, sorted_by_expert
from train.model.weights import initial_value, materialise
from train.strategies.recompute.apply import apply_checkpointing

SMALL = ("model=moe_tiny", "model.num_layers=2", "train.seq_len=16")


def moe(*overrides, precision=Precision.float64):
    return build(config(*SMALL, *overrides).model, precision)


def tokens(batch=3):
    return torch.randint(0, 256, (batch, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("overrides", [(), ("model.score_function=softmax",), ("model.top_k=1",)])
def test_a_mixture_is_the_gated_sum_of_its_experts(overrides):
    mixture = moe(*overrides).layers["0"].feed_forward
    x = torch.randn(2, 5, 128, dtype=torch.float64)
    gates, chosen = mixture.router(x)
    expected = mixture.shared(x)
    weights = zip(mixture.experts.gate, mixture.experts.up, mixture.experts.down, strict=True)
    for e, (gate, up, down) in enumerate(weights):
        share = (gates * (chosen == e)).sum(-1, keepdim=True)
        expected = expected + share * F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    assert torch.allclose(mixture(x), expected, atol=1e-12)
    total = gates.sum(-1)
    assert (total < 1).all() if "model.top_k=1" in overrides else torch.allclose(total, torch.ones_like(total))


def explicit_aux_loss(router, x):
    """Computed directly from the definition, for each sequence."""
    total = 0.0
    for x_TD in x:
        scores = (x_TD @ router.weight.T).sigmoid()
        chosen = scores.topk(router.top_k).indices
        num_experts = scores.shape[1]
        f = torch.bincount(chosen.flatten(), minlength=num_experts) * num_experts / (router.top_k * len(x_TD))
        total = total + (f * (scores / scores.sum(1, keepdim=True)).mean(0)).sum()
    return total


def test_the_injected_gradient_is_that_of_the_auxiliary_loss():
    router = moe("model.balance=aux_loss", "model.aux_loss_coef=0.3").layers["0"].feed_forward.router
    router.aux_scale = 1 / 7
    x = torch.randn(3, 16, 128, dtype=torch.float64, requires_grad=True)
    gates, _ = router(x)
    found = torch.autograd.grad((gates * 0).sum(), (x, router.weight))
    expected = torch.autograd.grad(0.3 / 7 * explicit_aux_loss(router, x), (x, router.weight))
    for a, b in zip(found, expected, strict=True):
        assert b.abs().max() > 0
        assert torch.allclose(a, b, atol=1e-14)
    assert router.sums[0].item() == pytest.approx(explicit_aux_loss(router, x).item(), rel=1e-12)


def test_a_sequence_over_shards_has_the_same_auxiliary_loss():
    model = config(*SMALL, "model.balance=aux_loss").model
    x = torch.randn(3, 16, 128, dtype=torch.float64)
    whole = build(model).layers["0"].feed_forward.router
    whole(x)[0].sum().backward()
    chosen = [whole(part)[1].flatten(1) for part in x.split(8, 1)]
    counts = [F.one_hot(experts, 8).sum(1).double() for experts in chosen]
    shards = [build(model).layers["0"].feed_forward.router for _ in range(2)]
    for router, part in zip(shards, x.split(8, 1), strict=True):
        router.sequence_shards, router.sum_over_sequence = 2, lambda own: sum(counts)
        router(part)[0].sum().backward()
    assert torch.allclose(shards[0].weight.grad + shards[1].weight.grad, whole.weight.grad, atol=1e-13)
    assert torch.allclose(shards[0].sums + shards[1].sums, whole.sums)


@pytest.mark.parametrize("mode", ActivationCheckpointing)
def test_a_token_is_counted_once(mode):
    model = moe()
    for layer in model.layers.values():
        apply_checkpointing(layer, mode)
    x = tokens()
    with torch.no_grad():
        model(x)
    assert all(router.num_chosen.sum() == 0 for router in routers(model.layers).values()), "evaluation counts nothing"
    for _ in range(2):
        model.loss(model(x), x).backward()
    assert [router.num_chosen.sum().item() for router in routers(model.layers).values()] == [2 * x.numel() * 2] * 2


def test_the_bias_decides_the_choice_and_not_the_gate():
    router = moe("model.balance=bias").layers["0"].feed_forward.router
    x = torch.randn(1, 4, 128, dtype=torch.float64)
    router.bias[5] = 10.0
    gates, chosen = router(x)
    assert (chosen[..., 0] == 5).all()
    scores = (x @ router.weight.T).sigmoid().gather(-1, chosen)
    assert torch.allclose(gates, scores / scores.sum(-1, keepdim=True))
    assert "layers.0.feed_forward.router.bias" in moe("model.balance=bias").state_dict()
    assert not any("num_chosen" in name for name in moe().state_dict())


def test_an_expert_without_tokens_has_zero_gradients():
    mixture = moe().layers["0"].feed_forward
    mixture.router.bias[0] = -10.0
    mixture(torch.randn(1, 4, 128, dtype=torch.float64)).sum().backward()
    for weight in mixture.experts.parameters():
        assert weight.grad[0].abs().max() == 0
        assert weight.grad.abs().max() > 0


def test_rows_sorted_by_expert_come_back():
    chosen = torch.tensor([[3, 0], [1, 3], [0, 3]])
    order, inverse, counts = sorted_by_expert(chosen, 5)
    assert counts.tolist() == [2, 1, 0, 3, 0]
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    rows = gather_rows(x, order, inverse, 2)
    assert torch.equal(gather_rows(rows, inverse, order), x.repeat_interleave(2, 0))
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, order, inverse, 2) ** 2, (x,))


def test_each_expert_is_drawn_by_itself():
    model_config = config(*SMALL).model
    name = "layers.0.feed_forward.experts.down"
    eight = initial_value(name, torch.Size((8, 128, 112)), model_config, 1)
    four = initial_value(name, torch.Size((4, 128, 112)), model_config, 1)
    assert torch.equal(eight[:4], four)
    assert not torch.equal(eight[0], eight[1])
    assert eight.std().item() == pytest.approx(0.5 * (112 * 4) ** -0.5, rel=0.02)


def test_flops_count_the_active_experts():
    sparse = config("model=moe_tiny").model
    twice = dataclasses.replace(sparse, num_experts=16)
    assert matmul_parameters(twice) - matmul_parameters(sparse) == 8 * 8 * 128, "more experts cost router rows only"
    more = dataclasses.replace(sparse, top_k=3)
    assert matmul_parameters(more) - matmul_parameters(sparse) == 8 * 3 * 128 * 112


@pytest.mark.gpu
def test_the_grouped_product_equals_the_loop():
    device = torch.device("cuda")
    model_config = config(*SMALL).model
    with torch.device("meta"):
        experts = Experts(model_config)
    materialise(experts, "layers.0.feed_forward.experts.", model_config, seed=1, device=device)
    rows = torch.tensor([5, 0, 17, 3, 0, 1, 30, 8], device=device)
    x = torch.randn(64, 128, device=device, dtype=torch.bfloat16, requires_grad=True)
    results = []
    for inputs in (x, x.float()):  # bf16 is grouped, float32 is not
        y = experts(inputs, rows)
        results.append((y.float(), *torch.autograd.grad(y.float().square().sum(), (x, *experts.parameters()))))
    for grouped, loop in zip(*results, strict=True):
        assert (grouped.float() - loop.float()).abs().max() <= 3e-2 * loop.float().abs().max()


def test_a_router_needs_no_bias_to_be_drawn():
    with torch.device("meta"):
        router = Router(config(*SMALL, "model.balance=none").model)
    materialise(router, "layers.0.feed_forward.router.", config(*SMALL).model, seed=1, device=CPU)
    assert router.bias is None and not router.num_chosen.is_meta
