"""The memory that a plan needs: state and gathered tensors of each strategy, and the message if it is too much."""

import math
from types import SimpleNamespace

import pytest

from launch.describe.description import holdings, memory
from launch.describe.memory import Capacity, GiB, Ranks, capacity_here, check_memory, gib, machine, shortage
from launch.explain import explained, problems
from tests.plans import plan_of
from train.config.problems import BadInput
from train.config.shapes import block
from train.measure.out_of_memory import remedies
from train.strategies.memory import needs, num_parameters


def test_what_fsdp_puts_together_within_a_step():
    line = "nproc=4 train.micro_batch_size=1 train.global_batch_size=16 strategy="
    plan = plan_of(f"{line}fsdp")
    total = 4 * num_parameters(plan.config.model)[0]
    layer = 4 * sum(map(math.prod, block(plan.config.model).values()))
    head = 4 * (256 * 128 + 128)
    assert needs(plan_of(f"{line}dp"), 0).unsharded == needs(plan_of(f"{line}tp"), 0).unsharded == 0
    assert needs(plan_of(f"{line}zero1"), 0).unsharded == 2 * total
    assert needs(plan_of(f"{line}zero2"), 0).unsharded == total + layer
    assert needs(plan, 0).unsharded == 3 * layer + head
    assert "the parameters of two blocks and of the head, and one block's gradients" in "".join(holdings(Ranks(plan)))
    assert "all parameters, and one block's gradients" in "".join(holdings(Ranks(plan_of(f"{line}zero2"))))
    assert "all parameters, and all gradients until the last microbatch" in "".join(
        holdings(Ranks(plan_of(f"{line}zero1")))
    )
    # FSDP over cp and ep: what tp and ep split is put together of a part only
    assert needs(plan_of(f"{line}fsdp_tp"), 0).unsharded < needs(plan, 0).unsharded


def test_deepspeed_holds_by_zeros_arithmetic():
    """The bytes of docs/deepspeed.md, which tests/test_deepspeed.py compares with those of a run."""
    total = 4 * num_parameters(plan_of("strategy=dp").config.model)[0]
    for stage, shards in ((1, (1, 1, 4)), (2, (1, 4, 4)), (3, (4, 4, 4))):
        one = needs(plan_of(f"strategy=ds_zero{stage} nproc=4"), 0)
        assert (one.parameters, one.gradients, one.optimiser) == tuple(
            size // parts for size, parts in zip((total, total, 3 * total), shards, strict=True)
        )
    plan = plan_of("strategy=ds_pp nproc=4")
    of_stages = [needs(plan, rank) for rank in range(4)]
    assert sum(one.parameters for one in of_stages) == total and of_stages[1].optimiser == 2 * of_stages[1].parameters
    ends = 4 * (2 * 256 * 128 + (1 + 2 * 8) * 128)  # embedding, head and norms are whole
    assert needs(plan_of("strategy=ds_autotp nproc=4"), 3).parameters == (total - ends) // 4 + ends
    ends += 4 * 8 * 2 * 64 * 128  # wk and wv are whole where there are fewer KV heads than ranks
    assert needs(plan_of("strategy=ds_autotp nproc=8"), 3).parameters == (total - ends) // 8 + ends
    assert needs(plan_of("strategy=ds_zero3 nproc=4 strategy.whole_below=200"), 0).parameters == (
        (total - 17 * 512) // 4 + 17 * 512
    )
    offloaded = needs(plan_of("strategy=ds_zero1 nproc=4 strategy.offload_optimizer=true"), 0)
    assert offloaded.on_device == 2 * total and offloaded.offloaded == 3 * total // 4


def test_memory_is_in_gib_of_three_digits():
    assert [gib(x * GiB) for x in (1050.69, 999.6, 123.4, 45, 2.5, 0.00574)] == [
        "1,050", "1,000", "123", "45.0", "2.50", "0.00574",
    ]  # fmt: skip
    assert gib(0) == "0"


def test_a_state_that_cannot_fit_is_said_with_what_would_fit():
    card = "model=llama_70b hardware=l40s precision=bf16 train.micro_batch_size=2"
    plan = plan_of(f"{card} strategy=dp nproc=8 train.global_batch_size=16")
    (problem,) = problems(plan.config, 8)
    assert problem.exit_code == 3
    assert "rank 0 holds 1,050 GiB" in problem.message and "hardware=l40s has 45.0 GiB" in problem.message
    there = plan.override(" ".join(problem.overrides))
    assert there.world_size == 32 and not problems(there.config, there.world_size)
    lines = explained(plan, [problem])
    assert "70,553,706,496 parameters" in lines[0] and any("so it cannot fit" in line for line in lines)
    two, three = (plan_of(f"{card} strategy={name} nproc=64 train.global_batch_size=128") for name in ("zero2", "fsdp"))
    assert "rank 0 holds 16.4 GiB" in str(shortage(Ranks(two), Capacity("l40s", int(44.99 * GiB), shared=False)))
    assert "and 135 GiB that are gathered within a step" in str(
        shortage(Ranks(two), Capacity("l40s", 2**35, shared=False))
    )
    assert shortage(Ranks(three), Capacity("l40s", int(44.99 * GiB), shared=False)) is None
    here = Capacity("this machine", 2**34, shared=True)
    small = plan_of("model=llama_1b strategy=dp nproc=2 train.global_batch_size=8 train.micro_batch_size=1")
    wanting = shortage(Ranks(small), here)
    assert wanting is not None
    assert wanting.message.startswith("2 processes together hold 26.5 GiB of parameters") and "16.0 GiB" in str(wanting)
    assert wanting.overrides == ("strategy.dp_replicate=null", "strategy.dp_shard=-1")
    assert "the state fits; activations need more" in memory(Ranks(plan_of("strategy=dp nproc=2")), machine())[-1]


@pytest.mark.parametrize(("devices", "fits"), [(2, True), (1, False)])
def test_the_memory_of_the_devices_that_there_are(devices, fits, monkeypatch):
    """Two ranks on two devices, or on one device with gloo. Each device has 8 GiB, and a rank of llama_1b needs 6.6."""
    device = SimpleNamespace(type="cuda")
    properties = SimpleNamespace(total_memory=8 * GiB)
    module = SimpleNamespace(get_device_properties=lambda _: properties, get_device_name=lambda _: "a card")
    monkeypatch.setattr("train.ranks.distributed.choose_runtime", lambda *_: SimpleNamespace(device=device))
    monkeypatch.setattr("torch.get_device_module", lambda _: module)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: devices)
    plan = plan_of("model=llama_1b strategy=tp nproc=2 train.micro_batch_size=1")
    capacity = capacity_here(plan.config, 2)
    assert capacity == Capacity("a card", 8 * GiB * devices // 2, shared=False)
    if fits:
        check_memory(plan.config, 2)
    else:
        with pytest.raises(BadInput, match=r"holds 6.63 GiB .* but a card has 4.00 GiB.*force=true starts it"):
            check_memory(plan.config, 2)


def test_advice_when_memory_runs_out_is_of_what_filled_it():
    config = plan_of("strategy=dp nproc=2 train.micro_batch_size=4").config
    assert remedies(config, built=True)[0] == "train.micro_batch_size=2"
    assert not any("batch" in one or "checkpointing" in one for one in remedies(config, built=False))
