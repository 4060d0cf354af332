"""`optim=adamw8bit`: AdamW with moments in 8 bits. It differs between layouts, and the proof says why."""

from itertools import accumulate

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from tests.rows.base import F32, configured
from train.checkpoint.checkpoints import state_bytes as checkpoint_bytes
from train.command.planning.footprint import footprint
from train.command.planning.job import of_plan
from train.config.plan import Plan
from train.ranks import eight_bit
from train.ranks.optim import ShardOptimiser
from train.ranks.state import in_memory, whole
from train.strategies import memory

WORDS = ("optim=adamw8bit", "optim.warmup_steps=0")


def trained(parameter: nn.Parameter, optimiser: ShardOptimiser, steps: int) -> None:
    generator = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        optimiser.step(1e-3)


def built(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Parameter, ShardOptimiser]:
    parameter = nn.Parameter(torch.linspace(-1, 1, 64 * 128, dtype=dtype).view(64, 128).clone())
    return parameter, ShardOptimiser({"a.weight": parameter}, configured([f"optim={name}"]).optim)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_computes_what_torchao_computes(monkeypatch):
    """torchao compiles its formula; here it runs without the compiler."""
    from torchao.optim import AdamW8bit

    ours, optimiser = built("adamw8bit")
    theirs = nn.Parameter(ours.detach().clone())
    config = configured(["optim=adamw8bit"]).optim
    other = AdamW8bit([theirs], lr=1e-3, betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=0.1)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        gradient = torch.randn(ours.shape, generator=generator)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimiser.step(1e-3)
        other.step()
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)
    mine, its = optimiser.inner.state[ours], other.state[theirs]
    for kind in ("exp_avg", "exp_avg_sq"):
        assert torch.allclose(mine[kind].scale, its[kind].scale, rtol=1e-5)
        assert (mine[kind].codes != its[kind].codes).float().mean() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_near_adamw(dtype):
    (exact, whole_state), (near, in_bits) = built("adamw", dtype), built("adamw8bit", dtype)
    start = exact.detach().clone()
    trained(exact, whole_state, 20)
    trained(near, in_bits, 20)
    moved = (exact - start).abs().mean()
    assert 0 < (near - exact).abs().mean() < 0.1 * moved, "8 bits"
    kept = in_bits.inner.state[in_bits.shards["a.weight"]]["exp_avg"]
    assert sum(part.nbytes for part in in_memory(kept)) < 0.4 * exact.numel() * 4
    assert whole(kept).dtype is dtype


def test_quantised_again_it_is_another_so_that_a_rank_keeps_its_codes():
    parameter, optimiser = built("adamw8bit")
    trained(parameter, optimiser, 3)
    kept = optimiser.inner.state[parameter]["exp_avg"]
    before, codes = whole(kept).clone(), {name: part.clone() for name, part in optimiser.codes().items()}
    kept.copy_(before)
    assert not torch.equal(whole(kept), before) and torch.allclose(
        whole(kept), before, atol=0.02 * float(before.abs().max())
    )
    for name, part in optimiser.codes().items():
        part.copy_(codes[name])
    assert torch.equal(whole(kept), before)


def test_a_large_parameter_is_updated_part_by_part(monkeypatch):
    (at_once, one), (in_parts, other) = built("adamw8bit"), built("adamw8bit")
    trained(at_once, one, 5)
    monkeypatch.setattr(eight_bit, "AT_ONCE", 3072)  # two parts, and a smaller last one
    trained(in_parts, other, 5)
    assert torch.equal(at_once, in_parts)
    assert all(torch.equal(codes, other.codes()[name]) for name, codes in one.codes().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_an_update_needs_for_a_moment_is_as_said(monkeypatch, dtype):
    for module in (eight_bit, memory):
        monkeypatch.setattr(module, "AT_ONCE", 2**16)
    parameter = nn.Parameter(torch.ones(3 * 2**16, dtype=dtype).view(-1, 256))
    config = configured(["optim=adamw8bit"]).optim
    optimiser = ShardOptimiser({"a.weight": parameter}, config)
    trained(parameter, optimiser, 1)
    parameter.grad = torch.ones_like(parameter)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        optimiser.inner.step()
    events = sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    peak = max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))
    assert peak == pytest.approx(memory.update_bytes(config, parameter.numel(), parameter.element_size()), rel=0.01)


def test_a_footprint_has_what_the_update_needs():
    words = ["model=llama_8b", "strategy=single", "precision=bf16", "train.seq_len=16", "train.global_batch_size=1"]
    found = {name: footprint(of_plan(Plan(configured([*words, f"optim={name}"]), 1))) for name in ("adamw8bit", "sgd")}
    assert found["adamw8bit"].kinds["temporary"] >= 49 * 2**24 > found["sgd"].kinds.get("temporary", 0)


@pytest.mark.parametrize(("size", "preset"), [(1, "dp"), (2, "fsdp"), (4, "tp_pp"), (2, "ep model=moe_tiny")])
def test_the_closed_form_knows_what_a_rank_holds(size, preset):
    words = [f"strategy={preset.split()[0]}", *preset.split()[1:], "optim=adamw8bit", F32]
    plan = Plan(configured(words), size)
    shapes = memory.parameter_shapes(plan, 0).values()
    config = plan.config.optim
    optimiser = ShardOptimiser({str(i): nn.Parameter(torch.zeros(shape)) for i, shape in enumerate(shapes)}, config)
    optimiser.make_state()
    held = sum(
        part.nbytes for state in optimiser.inner.state.values() for value in state.values() for part in in_memory(value)
    )
    assert held == memory.state_bytes(plan, 0)["optimiser"] < 2 * memory.state_bytes(plan, 0)["parameters"]


def test_the_proof_says_why_it_differs_and_a_checkpoint_is_not_larger_than_said():
    plan = Plan(configured(["strategy=fsdp", *WORDS]), 2)
    assert set(plan.config.differs()) == {"adamw_loss", "evaluate"}
    mixture = Plan(configured(["strategy=ep", "model=moe_tiny", *WORDS]), 2)
    assert set(mixture.config.differs()) == {"adamw_loss", "evaluate", "routing", "router_bias"}
    assert "8 bits" in plan.config.differs()["adamw_loss"]
    assert not plan.override("optim.name=adamw").config.differs()
    plain = checkpoint_bytes(plan.override("optim.name=adamw").config, 1000, 2)
    assert plain == 12_000 and checkpoint_bytes(plan.config, 1000, 2) == 14_000
