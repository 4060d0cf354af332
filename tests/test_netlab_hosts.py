"""The hosts and links of an emulated cluster: they carry what their rate allows, and whoever made them, nothing is
left."""

import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from launch.emulating import record
from launch.emulating.agents import Job, run
from launch.emulating.cluster import PAYLOAD, SWITCH, Cluster, cut
from launch.emulating.namespaces import Rights, network
from launch.emulating.record import MARK, Record, clean_up, recorded
from launch.start.alive import with_variable
from tests.hosts import allowed, two_hosts
from tests.started import REPO
from train.config.problems import BadInput

__all__ = ["two_hosts"]
pytestmark = pytest.mark.timeout(100)
SIZE = 2**19
RECEIVE = f"""
import socket
with socket.create_server(("0.0.0.0", 5000)) as server:
    print("ready", flush=True)
    peer, _ = server.accept()
    got = 0
    while got < {SIZE}:
        got += len(peer.recv(2**20))
    peer.sendall(b"+")
"""
SEND = f"""
import socket, sys, time
with socket.create_connection((sys.argv[1], 5000), timeout=30) as peer:
    start = time.perf_counter()
    peer.sendall(bytes({SIZE}))
    assert peer.recv(1) == b"+"
    print(time.perf_counter() - start)
"""
HOLD = """
import signal, subprocess, sys, time
from launch.emulating.cluster import Cluster
from launch.emulating.namespaces import network, rights
from launch.emulating.record import MARK, recorded
with recorded() as record, network(Cluster(2, 2), rights(), record) as net:
    net.do(net.cluster.shapes(1e8))
    env = {"PATH": "/usr/bin:/bin", MARK: record.mark}
    # a rank that is stopped does not see that the others end
    rank = subprocess.Popen([*net.enter(1), "sleep", "1000"], env=env, stdout=subprocess.DEVNULL)
    time.sleep(0.2)
    rank.send_signal(signal.SIGSTOP)
    print(record.mark, flush=True)
    time.sleep(1000)
"""


def seconds(net, sender, receiver):
    """How long SIZE bytes take from one host to another."""
    line = [sys.executable, "-c", RECEIVE]
    with subprocess.Popen([*net.enter(receiver), *line], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "ready\n"
        line = [sys.executable, "-c", SEND, net.cluster.address(receiver)]
        done = subprocess.run([*net.enter(sender), *line], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def held(mark):
    return with_variable(MARK, mark)


@pytest.mark.parametrize("rootless", [False, True])
def test_a_link_carries_what_it_is_shaped_to_and_is_counted(rootless):
    """A busy machine only makes it slower, so there are least times, and no longest."""
    if os.geteuid() and not rootless:
        pytest.skip("this user is not root; the rootless way is tested")
    allowed()
    with recorded() as owner, network(Cluster(2, 2, slow=((1, 8e6),)), Rights(rootless), owner) as net:
        net.do(net.cluster.shapes(40e6))
        before = net.sent()
        assert seconds(net, 0, 1) > 0.9 * 8 * SIZE / PAYLOAD / 40e6
        sent, got = (after - was for after, was in zip(net.sent()[0], before[0], strict=True))
        assert SIZE < sent < 1.2 * SIZE and got < 0.2 * SIZE
        assert seconds(net, 1, 0) > 0.9 * 8 * SIZE / PAYLOAD / 8e6, "host 1 sends at a rate of its own"
        net.do(net.cluster.unshapes())
        shown = subprocess.run([*net.enter(SWITCH), "tc", "qdisc"], capture_output=True, text=True)
        assert "tbf" not in shown.stdout
        mark = owner.mark
    assert not held(mark)


@pytest.mark.slow
def test_ranks_that_do_not_come_together_exchange_in_one_direction_after_the_other(two_hosts, tmp_path):
    """As in training. Of the message's time, the wait of the early rank is no part."""
    net, owner = two_hosts
    rate, late_ms, out = 1e8, 700, tmp_path / "rows.json"
    net.do(net.cluster.shapes(rate))
    words = (f"sizes={SIZE}", "ops=all_to_all", "device=cpu", f"late_ms={late_ms}", f"out={out}")
    job = Job(words, (0, 1), "scripts/calibrating/links.py")
    assert run(job, net, owner.mark, tmp_path, tmp_path / "run").codes == [0, 0]
    ((op, ranks, size, microseconds),) = json.loads(out.read_text())["rows"]
    assert (op, ranks, size) == ("all_to_all", 2, SIZE)
    assert 1.7 * (8 * SIZE / 2 / PAYLOAD / rate) < microseconds / 1e6 < late_ms / 1e3


def test_a_link_that_is_down_carries_nothing(two_hosts):
    net, _ = two_hosts
    ping = [sys.executable, "-c", "import socket; socket.create_connection(('10.77.0.102', 9), timeout=0.3)"]

    def said():
        return subprocess.run([*net.enter(0), *ping], capture_output=True, text=True, timeout=60).stderr

    assert "refused" in said()
    net.do([cut(1)])
    assert "refused" not in said()
    net.do([cut(1, up=True)])
    assert "refused" in said()


def test_what_a_killed_one_has_left_is_ended_and_a_live_one_is_not_touched(two_hosts):
    _, live = two_hosts
    mine = {one.pid for one in held(live.mark)}
    env = os.environ | {"PYTHONPATH": str(REPO)}
    with subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True, env=env) as owner:
        assert owner.stdout is not None
        mark = owner.stdout.readline().strip()
        left = held(mark)
        assert len(left) >= 4, "the bridge, two hosts and a stopped rank"
        assert not clean_up() and len(held(mark)) == len(left), "its owner is alive"
        owner.send_signal(signal.SIGKILL)
    (line,) = clean_up()
    assert str(owner.pid) in line and "was killed" in line
    assert not held(mark) and not [one for one in left if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    assert {one.pid for one in held(live.mark)} == mine
    assert [path.stem for path in record.folder().glob("*.json") if path.stem in (mark, live.mark)] == [live.mark]


def test_a_record_knows_its_process_by_more_than_the_id():
    own = Record.of_this_process()
    assert own.is_alive
    assert not Record(own.mark, own.boot, own.pid, own.started + 1).is_alive, "another process has this id now"
    assert not Record(own.mark, "an earlier start of the machine", own.pid, own.started).is_alive


def test_records_of_others_and_files_that_are_none_decide_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "folder", lambda: tmp_path)
    for number, text in enumerate(("", "[]", '{"mark": "../x", "boot": "", "pid": 1, "started": 1}', "{")):
        (tmp_path / f"{number}.json").write_text(text)
    assert clean_up() == [] and len([*tmp_path.iterdir()]) == 4


def test_a_folder_of_another_user_is_refused(monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    place = Path("/tmp/strategy-lab-netlab-12345")
    with ExitStack() as after:
        place.mkdir()
        after.callback(place.rmdir)
        with pytest.raises(BadInput, match="is not a folder that only this user can write"):
            record.folder()


def test_where_namespaces_are_not_allowed_the_fix_is_said(monkeypatch, tmp_path):
    for name in ("ip", "tc", "nsenter", "sh", "unshare"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'unshare failed: Operation not permitted' >&2; exit 1\n")
        (tmp_path / name).chmod(0o755)
    from launch.emulating import namespaces
    from launch.emulating.namespaces import rights

    monkeypatch.setattr(namespaces, "surroundings", lambda: {"PATH": str(tmp_path)})

    with pytest.raises(BadInput, match=r"Operation not permitted.*run it as root, or allow user namespaces") as refused:
        rights()
    assert refused.value.exit_code == 3
    (tmp_path / "tc").unlink()
    with pytest.raises(BadInput, match="tc is not installed: install iproute2"):
        rights()


def test_delays_are_refused_without_netem_by_name(monkeypatch, capsys):
    from launch import netlab

    monkeypatch.setattr(netlab, "rights", lambda: Rights(rootless=False))
    monkeypatch.setattr(netlab, "has_netem", lambda found, *limit: False)
    monkeypatch.setattr(netlab, "clean_up", lambda: [])
    with pytest.raises(SystemExit) as ended:
        netlab.main(["nodes=2", "delay=1ms", "strategy=dp"])
    assert ended.value.code == 3 and "leave delay and loss out" in capsys.readouterr().err
