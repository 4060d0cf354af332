"""Runs on several machines: which axes of the mesh cross them, and launch.node, on this machine as if it were two."""

import random
import sys

import pytest

from launch import explain, local, node
from launch.cluster.size import Size
from launch.describe.nodes import crosses, crossing, warnings
from tests.faults import (
    LONG_EVERY,
    LONG_LINE,
    LONG_STEPS,
    TEXT,
    has_saved,
    is_saved,
    life_of,
    losses_of,
    newest_step,
    run_in,
)
from tests.started import Started
from train.command import cli
from train.config.plan import Plan
from train.config.problems import BadInput
from train.config.shapes import coordinates
from train.config.strategy import MESH_AXES

slow = pytest.mark.slow
MESHES = ["4d", "3d", "fsdp_tp strategy.tp=4", "tp_pp strategy.pp=4", "hsdp"]


def plan(line, nproc):
    return Plan(cli.configured(line.split()), nproc)


@pytest.mark.parametrize("line", MESHES)
def test_an_axis_crosses_where_a_group_of_it_is_on_two_machines(line):
    for nproc in (16, 24):
        one = plan(f"strategy={line}", nproc)
        for per_node in (size for size in range(1, nproc + 1) if nproc % size == 0):
            for axis in MESH_AXES:
                machines: dict[tuple[int, ...], set[int]] = {}
                for rank in range(nproc):
                    place = coordinates(one, rank)
                    group = tuple(place[other] for other in MESH_AXES if other != axis)
                    machines.setdefault(group, set()).add(rank // per_node)
                truly = any(len(found) > 1 for found in machines.values())
                assert crosses(one, axis, per_node) == truly, (nproc, per_node, axis)


def test_explain_says_which_axis_crosses_and_warns_of_tp(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["", "strategy=3d", "nproc=8", "nodes=2"])
    explain.main()
    said = capsys.readouterr().out
    assert "2 nodes of 4 process(es): node 0 has ranks 0-3, and so on" in said
    assert "inside a node  dp_shard 2, tp 2\n  across nodes   pp 2\n" in said and "warning" not in said
    monkeypatch.setattr(sys, "argv", ["", "strategy=tp,dp", "nproc=4", "nodes=2", "train.global_batch_size=8"])
    explain.main()
    assert "axes across 2 nodes\n  tp: tp 4\n  dp: dp_replicate 4\n" in capsys.readouterr().out
    (warning,) = warnings(plan("strategy=fsdp_tp strategy.tp=8", 16), 4)
    assert warning == (
        "warning: strategy.tp=8 crosses nodes of 4 process(es), so that every layer waits for the network: "
        "use strategy.tp=4"
    )
    assert "such as fsdp_tp or tp_pp" in warnings(plan("strategy=tp", 8), 2)[0]
    assert "use more processes on each node" in warnings(plan("strategy=tp", 2), 2)[0]
    assert crossing(plan("strategy=ep model=moe_tiny", 4), 2)[-1].startswith("  the all-to-all of experts (ep 4)")


def test_a_large_world_is_answered_at_once():
    big = plan("strategy=4d strategy.tp=8 strategy.cp=4 strategy.pp=8", 16_384)
    lines = crossing(big, 2048)
    assert lines[1:3] == ["  inside a node  tp 8", "  across nodes   pp 8, dp_shard 64, cp 4"] and len(lines) == 3


def answer(monkeypatch, capsys, main, *words):
    monkeypatch.setattr(sys, "argv", ["", *words])
    code = 0
    try:
        main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    return code, *capsys.readouterr()


WRONG = {
    "nodes=2": "nodes=2 without head: the machines cannot find each other: use head=HOST:PORT",
    "nodes=2 node=2 head=a:1": "node=2 with nodes=2, but machines count from 0: use node=0 to node=1",
    "nodes=2 head=a:1 nproc=3": "nproc=3 is not divisible by nodes=2, but all nodes run equally many: use nproc=2",
    "nodes=2 head=a": "head=a is not valid: head must be HOST:PORT: use head=10.0.0.1:29500, for example",
    "nodes=2 head=a:1 strategy=tp strategy.tp=3": "strategy.tp=3",
}


@pytest.mark.parametrize("line", WRONG)
def test_what_is_typed_wrongly_is_answered_before_anybody_waits(line, monkeypatch, capsys):
    code, out, err = answer(monkeypatch, capsys, node.main, *line.split())
    assert (code, out) == (2, "") and WRONG[line] in err


def test_dry_run_prints_the_line_and_starts_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = ("strategy=fsdp_tp", "train.steps=3", "dry_run=true")
    code, out, err = answer(
        monkeypatch, capsys, node.main, "nodes=2", "node=1", "head=127.0.0.2:29500", "nproc=8", *words
    )
    head = "torchrun --nnodes=2 --node_rank=1 --master_addr=127.0.0.2 --master_port=29500"
    # with the address from which this machine reaches the head, as in the run
    assert (code, err) == (0, "") and out.startswith(f"{head} --local_addr=127.0.0.1 --nproc_per_node=4 ")
    assert out.endswith("train/main.py strategy=fsdp_tp train.steps=3\n")
    code, out, err = answer(monkeypatch, capsys, local.main, "nproc=4", *words)
    assert (code, err) == (0, "") and out.startswith("torchrun --standalone --local_addr=127.0.0.1 --nproc_per_node=4 ")
    assert out.endswith("train/main.py strategy=fsdp_tp train.steps=3\n") and not [*tmp_path.iterdir()]
    with pytest.raises(BadInput):
        Size(2, 5)


def start(folder, number, port, *words):
    (folder / "text.txt").write_text(TEXT)
    where = [f"nodes=2 node={number} nproc=2 head=127.0.0.1:{port} join_s=200 logs=logs".split()]
    return Started(folder, ["-m", "launch.node", *where[0], *LONG_LINE, *words])


@slow
@pytest.mark.timeout(300)
def test_two_nodes_train_the_curve_of_one_machine(undisturbed_long, tmp_path):
    """After a signal to one node both save and leave, and the same two lines go on."""
    port = node.free_port()
    for asked in (True, False):
        both = [start(tmp_path, number, port) for number in random.Random(port).sample(range(2), 2)]
        if asked:
            both[0].until(lambda: has_saved(tmp_path))
            both[0].process.terminate()
        ended = [one.end() for one in both]
        assert [code for code, _ in ended] == [75, 75] if asked else [0, 0], ended
        said = "".join(one.out() + text for one, (_, text) in zip(both, ended, strict=True))
        assert said.count("all nodes have joined: 0 (") == 1 and said.count("torchrun --nnodes=2 --node_rank=") == 2
        assert said.count("checkpoint saved at step") == asked, said
        is_saved(run_in(tmp_path), LONG_EVERY)
    run = run_in(tmp_path)
    assert losses_of(run) == undisturbed_long and newest_step(run) == LONG_STEPS and life_of(run).state == "finished"
    logs = {path.name: path.read_text() for path in (tmp_path / "logs").iterdir()}
    assert sorted(logs) == ["rank-0.err", "rank-0.out", "rank-1.err", "rank-1.out"]
    assert f"step {LONG_STEPS}/{LONG_STEPS}" in logs["rank-0.out"] and "step" not in logs["rank-1.out"]


@slow
@pytest.mark.timeout(200)
def test_a_lost_node_ends_the_others_with_a_reason(tmp_path):
    port = node.free_port()
    zero, one = (start(tmp_path, number, port) for number in range(2))
    zero.until(lambda: has_saved(tmp_path))
    one.kill()
    code, said = zero.end()
    assert code == 5 and "rank 0 lost the connection to another rank, which has ended" in said
