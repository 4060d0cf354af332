"""Nodes that find each other before torchrun starts: who joined, who is missing, and what differs."""

import dataclasses
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from launch import node as launcher
from launch.cluster.roll_call import PROGRAM, roll_call
from launch.start.environment import local_environment
from launch.start.nodes import Node, nodes_line
from train.command import cli
from train.config.problems import BadInput

pytestmark = pytest.mark.timeout(60)
FACTS = {"nodes": 2, "strategy.name": "dp", "torch": "2.13.0"}
HOST = socket.gethostname()
LATE = 2  # a time-out that shall pass


@pytest.fixture
def head():
    return Node(0, 2, "127.0.0.1", launcher.free_port(), join_s=30)


def called(*nodes_and_facts):
    """For each node, started one after the other: what it got, or its problems."""

    def call(node, facts):
        try:
            return roll_call(node, facts)
        except BadInput as error:
            return [*map(str, error.problems)], error.exit_code

    with ThreadPoolExecutor(len(nodes_and_facts)) as pool:
        waiting = []
        for node, facts in nodes_and_facts:
            waiting.append(pool.submit(call, node, facts))
            time.sleep(0.3)
        return [one.result() for one in waiting]


def other(head, number=1, **changes):
    return dataclasses.replace(head, number=number, **changes)


@pytest.mark.parametrize("later", [0, 1], ids=["node 0 is late", "node 1 is late"])
def test_nodes_that_agree_get_the_same_text_and_another_one_each_time(later, head, capsys):
    pairs = [(head, FACTS), (other(head), FACTS)]
    first, second = called(*(pairs if later else reversed(pairs)))
    assert first == second and isinstance(first, str)
    assert f"all nodes have joined: 0 ({HOST}), 1 ({HOST})" in capsys.readouterr().out
    with socket.create_server((head.head, head.port)):  # torchrun can use the port at once
        pass
    assert called(*pairs)[0] != first


def test_a_missing_node_is_named_on_every_node_that_joined(head):
    head = dataclasses.replace(head, count=3, join_s=LATE)
    for problems, code in called((head, FACTS), (other(head, 2), FACTS)):
        (said,) = problems
        assert said.startswith(f"2 of 3 nodes joined within join_s={LATE}: 0 ({HOST}), 2 ({HOST}); missing: 1: ")
        assert f"start them with node=NUMBER and head=127.0.0.1:{head.port}" in said and code == 3


def test_other_configs_and_versions_are_named_with_their_nodes(head):
    theirs = FACTS | {"strategy.name": "fsdp", "torch": "2.12.0"}
    on = "0 ({0}); {1} on nodes 1 ({0})"
    for problems, code in called((head, FACTS), (other(head), theirs)):
        assert [one.partition(": start")[0] for one in problems] == [
            f"nodes have different values of strategy.name: dp on nodes {on.format(HOST, 'fsdp')}",
            f"nodes have different values of torch: 2.13.0 on nodes {on.format(HOST, '2.12.0')}",
        ]
        assert code == 2


def test_a_number_that_was_given_twice_is_refused_and_the_others_start(head):
    head = dataclasses.replace(head, count=3)
    zero, one, again, two = called((head, FACTS), (other(head), FACTS), (other(head), FACTS), (other(head, 2), FACTS))
    assert zero == one == two
    ((said,), code) = again
    assert f"node=1 was given twice: 1 ({HOST}) came after 1 ({HOST})" in said and code == 3


def test_another_number_of_nodes_is_named_on_both(head):
    head = dataclasses.replace(head, join_s=LATE)
    (zero,), _ = (found := called((head, FACTS), (other(head, 3, count=4), FACTS | {"nodes": 4})))[0]
    ((said,), _) = found[1]
    assert f"node 3 ({HOST}) was started with nodes=4, node 0 with 2" in said
    assert "missing: 1; not taken: node 3" in zero


def test_a_node_that_leaves_may_come_again(head):
    with ThreadPoolExecutor(1) as pool:
        zero = pool.submit(roll_call, dataclasses.replace(head, count=3), FACTS)
        time.sleep(0.3)
        hello = {"program": PROGRAM, "node": 1, "host": "gone", "facts": {}}
        with socket.create_connection((head.head, head.port)) as guest:
            guest.sendall(json.dumps(hello).encode() + b"\n")
            time.sleep(0.3)
        time.sleep(0.3)
        one, two = called((other(head, 1), FACTS), (other(head, 2), FACTS))
        assert zero.result() == one == two


@pytest.mark.parametrize("sent", [b"", b"\0" * 100, b"{}\n", b"x" * 2**21, b'{"program": 1, "node": []}\n'])
def test_strangers_do_not_disturb(sent, head):
    def stranger():
        with socket.create_connection((head.head, head.port)) as guest:
            guest.sendall(sent)

    unwanted = threading.Timer(0.2, stranger)
    unwanted.start()
    first, second = called((head, FACTS), (other(head), FACTS))
    unwanted.join()
    assert first == second and isinstance(first, str)


def test_a_head_that_nobody_holds(head):
    ((said,), code) = called((other(head, join_s=1), FACTS))[0]
    assert said.startswith(f"node 1 could not join node 0 at head=127.0.0.1:{head.port} within join_s=1 (")
    assert code == 3 and "start node=0 there first" in said


def test_a_head_that_is_another_program(head):
    with socket.create_server((head.head, head.port)) as server:

        def greet():
            guest, _ = server.accept()
            with guest:
                guest.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
                guest.recv(100_000)

        program = threading.Thread(target=greet)
        program.start()
        ((said,), code) = called((other(head), FACTS))[0]
        program.join()
    assert (
        said.startswith(f"head=127.0.0.1:{head.port} is not node 0 of launch.node, but another program") and code == 3
    )


@pytest.mark.parametrize("wrong", ["192.0.2.1", "127.0.0.1"], ids=["not of this machine", "in use"])
def test_node_0_must_be_able_to_listen(wrong, head):
    with socket.create_server((head.head, head.port)):
        ((said,), code) = called((dataclasses.replace(head, head=wrong), FACTS))[0]
    assert said.startswith(f"node 0 cannot listen at head={wrong}:{head.port} (") and code == 3


def test_the_facts_have_the_config_the_versions_and_no_secret(monkeypatch):
    monkeypatch.setenv("PRIVATE", "secret-path")
    _, tree, _ = cli.parse(cli.parser("test", ""), ["strategy=tp", "data=text", "data.path=${oc.env:PRIVATE}"])
    facts = launcher.facts(tree, 2, 4)
    assert facts["strategy.name"] == "tp" and facts["nodes"] == 2 and facts["nproc"] == 4
    assert facts["data.path"].startswith("sha256:") and "secret-path" not in str(facts)
    assert {"torch", "python", "the source's commit"} <= facts.keys()


def test_torchrun_of_a_node():
    node = launcher.connected(Node(1, 2, "127.0.0.1", 29500, join_s=7))
    assert (node.address, node.interface) == ("127.0.0.1", "lo")
    line = nodes_line(["strategy=tp"], 4, node)
    how = (
        "--nnodes=2 --node_rank=1 --master_addr=127.0.0.1 --master_port=29500 --local_addr=127.0.0.1 --nproc_per_node=4"
    )
    assert line[:-2] == how.split() and line[-2].endswith("train/main.py") and line[-1] == "strategy=tp"
    env, notes = local_environment(4, {"PET_NNODES": "3", "RANK": "1"}, node)
    assert (env["GLOO_SOCKET_IFNAME"], env["PET_RDZV_CONF"]) == ("lo", "timeout=7") and "PET_NNODES" not in env
    assert notes == ["ignored, as this launch sets its own values: PET_NNODES, RANK"]
    assert local_environment(4, {"GLOO_SOCKET_IFNAME": "eth1"}, node)[0]["GLOO_SOCKET_IFNAME"] == "eth1"
    assert launcher.connected(Node(1, 2, "no.such.host.invalid", 1)).interface == ""
