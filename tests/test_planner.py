"""The planner's cost model on plans of the lab."""

import math

import pytest

from tests.plans import plan_of
from train.command.planning import constants
from train.command.planning.job import missing_figures, of_plan, rate_of_products
from train.command.planning.links import Group, group_of, network
from train.command.planning.quantities import quantities
from train.command.planning.step_time import layer_time, step_time

BASE = "model=llama_8b hardware=h100_sxm precision=bf16 train.seq_len=4096 train.global_batch_size=64"


def predicted(line):
    return step_time(quantities(of_plan(plan_of(f"{BASE} {line}"))), constants.load())


@pytest.mark.parametrize(
    "line",
    ["strategy=single nproc=1", "strategy=fsdp nproc=8", "strategy=tp nproc=8", "strategy=tp_pp nproc=16 strategy.tp=8",
     "strategy=fsdp_cp nproc=16", "strategy=zero1 nproc=64"],
)  # fmt: skip
def test_products_stay_below_the_measured_peak(line):
    q = quantities(of_plan(plan_of(f"{BASE} {line}")))
    forward, backward = layer_time(q, constants.load())
    flops = 2 * (q.work.forward.volume + q.work.backward.volume)
    assert flops / (forward.products + backward.products) < 794.5e12
    assert all(value >= 0 for value in step_time(q, constants.load()).exposed.values())


def test_what_makes_a_step_longer():
    alone = predicted("strategy=fsdp nproc=8")
    assert predicted("strategy=fsdp nproc=8 train.activation_checkpointing=full").compute > 1.2 * alone.compute
    slow = predicted("strategy=fsdp nproc=64 hardware.node_gb_per_s=10")
    assert slow.exposed["dp"] > 3 * predicted("strategy=fsdp nproc=64").exposed["dp"]
    assert predicted("strategy=tp_pp nproc=16 strategy.tp=8 train.micro_batch_size=8").bubble > 0


def test_time_of_a_collective():
    plan = plan_of(f"{BASE} strategy=fsdp_tp nproc=64 strategy.tp=4")
    assert group_of(plan, "tp") == Group(4, 4)
    assert group_of(plan, "dp_shard") == Group(16, 2)
    net = network(plan.config.hardware, constants.load())
    inside = net.seconds("all_gather", 0, 10**9, Group(8, 8))
    assert inside == pytest.approx(7 / 8 * 1e9 / net.link)
    assert net.seconds("all_reduce", 0, 10**9, Group(8, 8)) == pytest.approx(2 * inside)
    assert net.seconds("all_gather", 1, 0, Group(16, 8)) > net.seconds("all_gather", 1, 0, Group(8, 8))


def test_ranks_that_share_experts_lie_apart():
    plan = plan_of(f"{BASE} model=moe_1b strategy=ep strategy.ep=4 nproc=16")
    assert (group_of(plan, "ep"), group_of(plan, "efsdp")) == (Group(4, 4), Group(4, 2))


@pytest.mark.parametrize(("method", "ops"), [("allgather", {"all_gather", "reduce_scatter"}), ("ring", {"all_to_all"})])
@pytest.mark.parametrize("line", ["strategy=pp strategy.cp=4 nproc=8", "strategy=cp nproc=4"])
def test_keys_and_values_are_sent_with_every_microbatch(line, method, ops):
    """Over `cp` alone, FSDP shares an axis with attention."""
    q = quantities(of_plan(plan_of(f"{BASE} {line} strategy.cp_method={method}")))
    over_cp = [one for one in q.kinds[0].messages if one.axis == "cp"]
    assert {one.op for one in over_cp if not one.of_data} - {"all_reduce"} == ops
    assert {one.op for one in over_cp if one.of_data} == {"all_gather", "reduce_scatter"}
    assert {one.per_step for one in over_cp if one.of_data} == {"pp" in line}
    assert not any(one.per_step for one in over_cp if not one.of_data)


def test_rates_of_products():
    hardware = plan_of(f"{BASE} strategy=single").config.hardware
    assert rate_of_products(hardware, "fp8") == 1402.6
    assert rate_of_products(hardware, "nvfp4") == 1402.6
    assert rate_of_products(hardware, "float32") == pytest.approx(67 * 794.5 / 989)
    assert rate_of_products(hardware, "float64") is None
    slow, fast = (predicted(f"strategy=fsdp nproc=8 precision={name}").compute for name in ("float32", "bf16"))
    assert slow > 8 * fast, "attention and the head are computed in float32 too"


def test_missing_figures_are_named():
    job = of_plan(plan_of(BASE.replace("h100_sxm", "l40s") + " strategy=fsdp nproc=8"))
    assert {"link_gb_per_s", "matmul_tflops.bf16"} <= {*missing_figures(job)}
    assert missing_figures(of_plan(plan_of(f"{BASE} strategy=fsdp nproc=8"))) == []


def test_every_constant_has_a_reason_and_a_source():
    for name, entry in constants.stored().items():
        assert {"expected", "spread", "value", "reason", "source"} == entry.keys(), name
        assert abs(math.log(entry["value"] / entry["expected"])) < 3 * entry["spread"], name
