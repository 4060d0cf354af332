"""What happens to hosts and links of an emulated cluster costs no step: the same line goes on, as after other faults.

The invariants are those of tests/test_faults.py, which tests/faults.py checks: a verified checkpoint, the undisturbed
curve to the last bit (so no sample twice), each step once, the exit code with its reason, and nothing left behind.
"""

import re
import time

import pytest

from launch.emulating import record
from launch.emulating.record import MARK
from launch.start.alive import with_variable
from tests import started as programs
from tests.faults import LINE, TEXT, is_saved, is_whole, losses_of
from tests.hosts import allowed, needs_netem
from tests.started import Started
from train.checkpoint.folder import complete

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
CALM = "fault=late:1:0.1s"  # a host that is hardly late: with any fault, nothing is measured before
SPEED = "20mbit"  # at which a step takes a quarter of a second
SHORT = "runtime.timeout_s=10"


class Netlab(Started):
    """launch.netlab with two hosts of one rank in `folder`."""

    def __init__(self, folder, fault, *words):
        (folder / "text.txt").write_text(TEXT)
        line = [word for word in LINE if not word.startswith("runtime.device=")]
        super().__init__(folder, ["-m", "launch.netlab", "nodes=2", f"inter={SPEED}", fault, *line, *words])

    def run(self):
        (path,) = self.folder.glob(f"runs/netlab-*/{SPEED}/dp-*")
        return path

    def log(self, host):
        (path,) = self.folder.glob(f"runs/netlab-*/{SPEED}/points/0/{host}.log")
        return path.read_text()


@pytest.fixture
def start(tmp_path):
    allowed()
    started = []

    def begin(fault, *words):
        started.append(Netlab(tmp_path, fault, *words))
        return started[-1]

    yield begin
    for one in started:
        one.kill()


def is_gone(run):
    """No process, record, namespace or link of it is left: hosts and links live as long as processes in them."""
    assert not [path for path in record.folder().glob("*.json") if f'"pid": {run.process.pid},' in path.read_text()]
    assert not with_variable(programs.MARK, run.mark)


def test_one_run_survives_its_links_and_hosts(start, undisturbed):
    """A link that stays down, a host that loses its power, a launcher that is killed while the last host has come late,
    and a link that is down for seconds only, which costs nothing but time: each start goes on from the one before."""
    first = start("fault=down:1@6", SHORT)
    code, _ = first.end()
    assert code == 5, first.out()
    said = (
        r"host \d failed first, exit code 5; its last lines:\n( .*\n)*    rank \d waited longer than runtime.timeout_s"
    )
    assert re.search(said, first.out()), first.out()
    assert "Traceback" not in first.out() + first.log(0) + first.log(1)
    run = is_left(first)

    second = start("fault=kill:1@10", SHORT)
    code, _ = second.end()
    assert code == 137 and "host 1 failed first, exit code 137" in second.out(), second.out()
    assert re.search(r"rank 0 .*", second.log(0)) and "Traceback" not in second.log(0), second.log(0)
    assert "continuing runs/" in second.log(0) and is_left(second) == run

    third = start("fault=late:1:5s", SHORT)
    before = losses_of(run)[-1][0]
    third.until(lambda: losses_of(run)[-1][0] > before)
    assert "continuing runs/" in third.log(0), "the late host was waited for"
    third.process.kill()
    third.process.wait()
    record.clean_up()  # as the next start does
    assert is_left(third) == run

    last = start("fault=down:1:3s@20", SHORT)
    code, said = last.end()
    assert (code, said) == (0, ""), last.out()
    assert "continuing runs/" in last.log(0) and last.run() == run
    is_whole(run, undisturbed)
    is_gone(last)


def is_left(start):
    """Nothing of this start, which did not come to its end, but what the next one needs. Returns the run's folder."""
    is_gone(start)
    is_saved(start.run())
    return start.run()


def test_a_host_that_comes_too_late_is_not(start, tmp_path):
    began = time.monotonic()
    run = start("fault=late:1:300s", "join_s=5")
    code, _ = run.end()
    assert code and "host 0 failed first" in run.out() and time.monotonic() - began < 200, run.out()
    assert not [*tmp_path.glob(f"runs/netlab-*/{SPEED}/dp-*")]
    is_gone(run)


def test_a_host_that_sends_slower_than_it_receives(tmp_path, undisturbed):
    from launch.emulating.agents import Job
    from launch.emulating.agents import run as run_job
    from launch.emulating.cluster import Cluster
    from launch.emulating.namespaces import network

    (tmp_path / "text.txt").write_text(TEXT)
    words = [word.replace("data.path=", f"data.path={tmp_path}/") for word in LINE]
    with record.recorded() as owner, network(Cluster(2, 2, slow=((1, 16e6),)), allowed(), owner) as net:
        net.do(net.cluster.shapes(40e6))
        outcome = run_job(
            Job((*words, f"metrics.dir={tmp_path}/runs"), (0, 1)), net, owner.mark, tmp_path, tmp_path / "r"
        )
        assert outcome.exit_code == 0, (tmp_path / "0.log").read_text()
        sent = [both[0] for both in outcome.sent.values()]
        assert 0.8 < sent[0] / sent[1] < 1.25, "both hosts send equally much, however long it takes"
    (path,) = (tmp_path / "runs").iterdir()
    assert [numbers for _, numbers in losses_of(path)] == [numbers for _, numbers in undisturbed]
    assert not with_variable(MARK, owner.mark)


def test_delays_and_losses(start, undisturbed):
    needs_netem()
    run = start(CALM, "delay=1ms", "loss=1%")
    code, said = run.end()
    assert (code, said) == (0, ""), run.out()
    is_whole(run.run(), undisturbed)
    assert complete(run.run())
    is_gone(run)
