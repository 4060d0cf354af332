"""What a launcher makes of the ends of its ranks, without torch: the cause, the words, the exit code, and the watch."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import psutil
import pytest

from launch.start.endings import Ending, cause, how_ended
from launch.start.watch import ENDING_S, PAUSE_S, Watch
from train.command.process.signals import Signals
from train.config.problems import EXIT_PEER
from train.ranks.peers import because_of_a_peer

TIMEOUT_S = 8.0


@pytest.mark.parametrize(
    ("codes", "rank"),
    [
        ({0: -15, 1: -9}, 1),  # torchrun ended rank 0
        ({0: 5, 1: -11, 2: 5}, 1),  # the others lost it
        ({0: 5, 1: 1, 2: -15}, 1),
        ({0: -6, 1: 1}, 1),  # NCCL aborted rank 0
        ({0: -6, 1: 5}, 0),
        ({0: 5, 1: -15}, 0),
        ({0: 2, 1: 2}, 0),
        ({3: -15}, 3),
    ],
)
def test_the_cause_is_not_one_that_followed(codes, rank):
    assert cause([Ending(one, code) for one, code in codes.items()]).rank == rank


def test_a_stopped_rank_is_the_cause_if_it_was_late_or_nobody_else_was():
    late, early = Ending(1, -9, 9.0, TIMEOUT_S), Ending(1, -9, 1.0)
    assert cause([Ending(0, 1), late]) is late
    assert cause([Ending(0, 5), early]) is early
    assert cause([Ending(0, 1), early]).rank == 0


def test_how_a_process_ended():
    assert how_ended(7) == "exited with code 7"
    assert how_ended(-9).startswith("was ended by signal 9 (SIGKILL): ")
    assert how_ended(-signal.SIGRTMIN - 1) == f"was ended by signal {signal.SIGRTMIN + 1}"


@dataclass
class Failure:
    exitcode: int
    timestamp: int = 100


@pytest.mark.parametrize(
    ("codes", "done", "allowed", "again", "code", "says"),
    [
        ({1: -9}, 0, 2, True, 137, "rank 1 was ended by signal 9 (SIGKILL): "),
        ({1: -9}, 2, 2, False, 137, "rank 1 was ended by signal 9 (SIGKILL): "),
        ({0: 1, 1: -15}, 0, 0, False, 1, ""),  # it has printed its traceback
        ({0: 2, 1: 2}, 0, 2, False, 2, ""),
        ({0: 5, 1: -15}, 0, 0, False, 5, "still running until then: rank 1"),
        ({0: 77, 1: -15}, 1, 2, True, 77, "rank 0 exited with code 77; all ranks are started again (restart 2 of 2)"),
        ({0: 143, 1: 143}, 0, 2, False, 143, "rank 0 exited with code 143"),
        ({0: 137, 1: -15}, 0, 2, True, 137, "rank 0 exited with code 137; all ranks are started again"),
        ({0: 6, 1: 6}, 0, 2, False, 6, ""),  # the loss is not finite, and would be so again
        ({0: 75, 1: 75}, 0, 2, False, 75, ""),
    ],
)
def test_what_is_said_of_a_failure(codes, done, allowed, again, code, says, capsys):
    read, write = os.pipe()
    watch = Watch(TIMEOUT_S, count=write)
    assert watch.failed({rank: Failure(one) for rank, one in codes.items()}, done, allowed) is again
    os.close(write)
    with open(read, "rb") as counted:
        assert counted.read() == (b"+" if again else b"")
    said = capsys.readouterr().err
    assert said.startswith(says) and len(said.splitlines()) == bool(says)
    assert ("started again" in said) is again
    assert ("(after 2 restart(s))" in said) is (done == 2)
    assert watch.exit_code(None) == code
    watch.started({})
    assert watch.exit_code(None) == 0, "a failure before a restart does not count"


def test_what_ends_later_is_not_the_cause():
    watch = Watch()
    watch.failed({0: Failure(1), 1: Failure(-9, timestamp=110)}, 0, 0)
    assert watch.exit_code(None) == 1


class Ended:
    """A process that has ended."""

    def __init__(self, returncode):
        self.pid, self.returncode = -1, returncode


@pytest.mark.parametrize(
    ("codes", "code", "says"),
    [
        ([], 143, "the run was ended by signal 15 (SIGTERM)"),
        ([0, 0], 0, ""),
        ([-15, 143], 143, "the run was ended by signal 15 (SIGTERM)"),
        ([5, -15], 143, "the run was ended by signal 15 (SIGTERM)"),
        ([75, 75], 75, ""),  # they have said why they left
        ([75, -9], 137, "rank 1 did not end in time after signal 15 (SIGTERM), and was killed"),
        ([-11, -15], 139, "rank 0 was ended by signal 11 (SIGSEGV): "),
    ],
)
def test_the_exit_code_after_a_signal(codes, code, says, capsys):
    watch = Watch()
    ranks: dict[int, Any] = {rank: Ended(one) for rank, one in enumerate(codes)}
    watch.started(ranks)
    assert watch.exit_code(signal.SIGTERM) == code
    said = capsys.readouterr().err
    assert said.startswith(says) and len(said.splitlines()) == bool(says)


@pytest.fixture
def asleep():
    """Starts processes that only sleep."""
    processes = []

    def start():
        processes.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def stop(process):
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    assert psutil.Process(process.pid).status() == psutil.STATUS_STOPPED


def looks(watch, begin, end):
    """The watch looks once a second of a pretended time."""
    for now in range(begin, end + 1):
        watch.look(watch._looked + 1 if now else watch._looked)


@pytest.mark.timeout(60)
def test_a_stopped_rank_is_killed_when_it_is_late(asleep):
    watch, ranks = Watch(TIMEOUT_S), {0: asleep(), 1: asleep()}
    watch.started(ranks)
    stop(ranks[1])
    looks(watch, 0, 7)
    assert ranks[1].poll() is None
    looks(watch, 8, 9)
    assert ranks[1].wait(10) == -9
    assert ranks[0].poll() is None
    watch.failed({1: Failure(-9)}, 0, 0)
    assert watch.ending is not None and watch.ending.timeout_s == TIMEOUT_S


@pytest.mark.timeout(60)
def test_a_stopped_rank_is_left_alone_if_nobody_waits_or_it_goes_on(asleep):
    watch, alone = Watch(TIMEOUT_S), asleep()
    watch.started({0: alone})
    stop(alone)
    looks(watch, 0, 30)
    assert alone.poll() is None
    ranks = {0: asleep(), 1: asleep()}
    watch.started(ranks)
    stop(ranks[0])
    looks(watch, 0, 5)
    ranks[0].send_signal(signal.SIGCONT)
    os.waitid(os.P_PID, ranks[0].pid, os.WCONTINUED)
    looks(watch, 6, 20)
    assert ranks[0].poll() is None


@pytest.mark.timeout(60)
def test_the_clock_restarts_when_the_whole_job_was_stopped(asleep):
    watch, ranks = Watch(TIMEOUT_S), {0: asleep(), 1: asleep()}
    watch.started(ranks)
    stop(ranks[1])
    looks(watch, 0, 3)
    watch.look(watch._looked + PAUSE_S + 100)
    assert ranks[1].poll() is None


@pytest.mark.timeout(60)
def test_what_cannot_end_after_a_crash_is_killed(asleep):
    ranks = {0: asleep(), 1: asleep(), 2: asleep()}
    watch = Watch()
    watch.started(ranks)
    stop(ranks[1])
    ranks[2].kill()
    ranks[2].wait()
    looks(watch, 0, 1)
    assert ranks[1].wait(10) == -9, "it would not react to TERM"
    looks(watch, 2, int(ENDING_S) - 1)
    assert ranks[0].poll() is None
    looks(watch, int(ENDING_S), int(ENDING_S) + 3)
    assert ranks[0].wait(10) == -9


def error(name, text, before=None):
    found = type(name, (RuntimeError,), {})(text) if name != "RuntimeError" else RuntimeError(text)
    found.__cause__ = before
    return found


PAIR = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4105"
BUFFER = "[/x/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 8000ms for recv operation to complete"
NCCL = (
    "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=6, OpType=ALLREDUCE, Timeout(ms)=8000) ran"
)


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (error("RuntimeError", PAIR), r"lost the connection .* \(Connection closed by peer \[127.0.0.1\]:4105\)"),
        (error("RuntimeError", BUFFER), "waited longer than runtime.timeout_s=8 s for another rank, .*"),
        (error("DistBackendError", NCCL), "waited longer than runtime.timeout_s=8 s for another rank, .*"),
        (error("DistBackendError", "NCCL error: remote process exited or there was a network error"), "lost the .*"),
        (error("DistStoreError", "wait timeout after 1500ms, keys: /a"), "waited longer than .*=1.5 s .*"),
        (error("RuntimeError", "stage 0 failed to run forward", error("RuntimeError", PAIR)), "lost the connection .*"),
        (error("RuntimeError", PAIR, ValueError("no luck")), ""),  # the first error is its own
        (error("RuntimeError", "mat1 and mat2 shapes cannot be multiplied"), ""),
        (error("DistBackendError", "Duplicate GPU detected : rank 0 and rank 1"), ""),
        (error("DistNetworkError", "The server socket has failed to listen on any local network address."), ""),
        (ValueError(PAIR), ""),
    ],
)  # fmt: skip
def test_an_error_because_of_another_rank(found, says):
    assert re.fullmatch(says, because_of_a_peer(found)), because_of_a_peer(found)


@pytest.mark.parametrize(("found", "codes"), [(PAIR, [EXIT_PEER]), ("mine", [])])
def test_a_signal_before_the_loss_of_a_peer_ends_a_rank_at_once(found, codes, monkeypatch):
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with pytest.raises(RuntimeError), Signals():
        signal.raise_signal(signal.SIGTERM)
        raise RuntimeError(found)
    assert ended == codes, "an error of its own is still to be said"
