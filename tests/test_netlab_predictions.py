"""The prediction for an emulated cluster: messages by closed forms, and computation by a profile."""

import dataclasses
import math

import pytest

from launch.emulating.cluster import PAYLOAD
from launch.emulating.predicting import Emulated, Measured, prediction
from tests.plans import plan_of
from train.command.planning.links import Group, edge_bytes
from train.command.planning.quantities import Message
from train.config.strategy import MESH_AXES

MiB = 2**20
LATENCY_S = 0.002
OPS = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", "send")
LINK = Measured.of([[op, ranks, 4096, 1e6 * LATENCY_S] for op in OPS for ranks in (2, 4)])
FAST = Measured.of([["all_reduce", ranks, 4 * MiB, 1e4] for ranks in (2, 4)])  # 3.4 Gbit/s
TWO_BY_TWO = dict.fromkeys(MESH_AXES, 1) | {"pp": 2, "tp": 2}
ONE_AXIS = dict.fromkeys(MESH_AXES, 1)


def planned(line, nproc):
    return plan_of(f"{line} hardware=measured/cpu_x2 train.global_batch_size=8 nproc={nproc}")


def predicted(plan, hosts, inter, intra=None):
    return prediction(plan, plan.config.hardware, hosts, inter, intra, LINK, FAST)


def message(op, axis, size, ranks, calls=1):
    return Message(axis, op, calls, size, Group(ranks, ranks))


@pytest.mark.parametrize(
    ("op", "edges"),
    [("all_reduce", 1.5), ("reduce_scatter", 1.5), ("all_gather", 0.75), ("all_to_all", 0.25), ("send", 1.0)],
)
def test_bytes_of_an_edge_of_a_ring_of_four(op, edges):
    assert edge_bytes(op, 4, 1000.0) == 1000 * edges


def emulated(degrees, hosts, inter=math.inf, intra=math.inf):
    none = (0.0, 0.0, 0.0, 0.0, 0.0)
    return Emulated(*none, degrees=degrees, hosts=hosts, inter=inter, intra=intra, measured=LINK)


def test_a_message_is_its_latency_and_its_bytes_over_the_busiest_link():
    hosts = [0, 1, 2, 3]
    net = emulated(ONE_AXIS | {"dp_replicate": 4}, hosts, inter=8e6)
    found = net.known(message("all_reduce", "dp_replicate", MiB, 4, calls=3))
    assert found == pytest.approx(3 * LATENCY_S + 1.5 * MiB / 1e6)
    all_to_all = net.known(message("all_to_all", "dp_replicate", MiB, 4))
    assert all_to_all == pytest.approx(LATENCY_S + 0.75 * MiB / 1e6), "a part for each of the three others"
    assert net.known(message("all_reduce", "tp", MiB, 1)) == 0.0
    two = emulated(ONE_AXIS | {"dp_shard": 2}, [0, 1], inter=8e6)
    gathered = two.known(message("all_gather", "dp_shard", MiB, 2))
    assert gathered == pytest.approx(LATENCY_S + 1.5 * 0.5 * MiB / 1e6), "one of its halves waits for the other way"


def test_the_labs_own_gathers_are_exchanges_on_gloo():
    net = emulated(ONE_AXIS | {"tp": 4}, [0, 1, 2, 3], inter=8e6)
    assert net.loads(message("reduce_scatter", "tp", MiB, 4)) == (0.75 * MiB, 0.0), (
        "a part for each of the three others"
    )
    assert net.loads(message("all_reduce", "tp", MiB, 4)) == (1.5 * MiB, 0.0)


def test_two_ranks_send_in_turn_as_much_as_was_measured():
    link = 1e6  # bytes/s
    times = {4096: 0.001, MiB: 0.001 + 0.7 * (MiB - 4096) / link, 2 * MiB: 0.001 + 0.8 * (2 * MiB - 4096) / link}
    measured = Measured({("all_to_all", 2): times})
    assert measured.in_turn("all_to_all", 2, 8 * link, 9 * MiB) == pytest.approx(1.6), "of the nearest, half of it sent"
    assert measured.in_turn("all_to_all", 2, 8 * link, 64) == pytest.approx(1.4), "never of the latency"
    assert measured.in_turn("all_to_all", 3, 8 * link, MiB) == 1.0
    assert Measured({}).in_turn("all_to_all", 2, 8 * link, MiB) == 2.0, "of large messages, if none was measured"


def test_groups_of_a_host_share_its_link_and_what_stays_inside_does_not_use_it():
    usual, other = (emulated(TWO_BY_TWO, hosts, 8e6, 80e6) for hosts in ([0, 0, 1, 1], [0, 1, 0, 1]))
    tp = message("all_reduce", "tp", MiB, 2)
    assert usual.loads(tp) == (0.0, 2 * MiB), "both edges of a ring of two are inside"
    assert other.loads(tp) == (2 * MiB, 0.0), "two groups over one link"
    assert usual.known(tp) == pytest.approx(LATENCY_S + 2 * MiB / 1e7)
    assert other.known(tp) == pytest.approx(LATENCY_S + 2 * MiB / 1e6)
    assert other.loads(message("send", "pp", MiB, 2)) == (0.0, MiB), "a chain is not closed"


@pytest.mark.parametrize("strategy", ["dp", "fsdp", "tp", "pp"])
def test_a_slower_link_adds_its_bytes_and_nothing_to_the_computation(strategy):
    plan = planned(f"strategy={strategy}", 2)
    slow, fast = predicted(plan, [0, 1], 25e6), predicted(plan, [0, 1], 1e9)
    assert slow.time.compute == fast.time.compute and slow.time.optimiser == fast.time.optimiser
    assert slow.sent == fast.sent and slow.time.total > fast.time.total
    if strategy in ("fsdp", "tp"):  # every message is waited for
        added = sum(slow.time.exposed.values()) - sum(fast.time.exposed.values())
        least = sum(slow.sent.values()) * 8 * (1 / 25e6 - 1 / 1e9) / PAYLOAD
        longest = {"fsdp": 1.5, "tp": 2.0}[strategy]  # a half of an all-gather waits for the other way, or an exchange
        assert least < added < longest * least


def test_the_gradients_of_ddp_are_sent_once_and_a_model_of_one_bucket_hides_nothing():
    plan = planned("strategy=dp train.micro_batch_size=4", 2)
    found = predicted(plan, [0, 1], 25e6)
    gradients = 4 * 1_542_272
    assert sum(found.sent.values()) == pytest.approx(gradients, rel=1e-3)
    least = gradients * 8 / 25e6 / PAYLOAD
    assert sum(found.time.exposed.values()) == pytest.approx(least, rel=0.1)
    small = dataclasses.replace(plan.config.strategy, bucket_mb=1.0)
    several = dataclasses.replace(plan, config=dataclasses.replace(plan.config, strategy=small))
    whole, parts = (sum(predicted(one, [0, 1], 250e6).time.exposed.values()) for one in (plan, several))
    assert parts < 0.95 * whole, "the first buckets run beside the backward"


def test_the_other_order_moves_the_bytes_of_tp_to_the_slow_link():
    plan = planned("strategy=tp_pp", 4)
    usual, other = predicted(plan, [0, 0, 1, 1], 1e8, 2e9), predicted(plan, [0, 1, 0, 1], 1e8, 2e9)
    assert usual.sent["tp"] == 0 < other.sent["tp"] and other.sent["pp"] == 0 < usual.sent["pp"]
    assert other.time.total > usual.time.total and other.messages == usual.messages


def test_without_a_shaper_the_machine_itself_is_the_limit():
    plan = planned("strategy=tp", 2)
    unshaped, shaped = predicted(plan, [0, 1], math.inf), predicted(plan, [0, 1], 1e12)
    assert math.isfinite(unshaped.time.total) and unshaped.time.total == shaped.time.total
