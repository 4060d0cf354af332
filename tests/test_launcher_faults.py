"""A launcher and its ranks: each fault is named in one line, has its exit code, and leaves no process behind."""

import os
import re
import signal
import time

import pytest
import torch

from tests.started import LIMIT_S, REPO, Started


class Launched(Started):
    """A launcher that runs tests/faulty_rank.py in `folder`."""

    def __init__(self, folder, fault, *, device="cpu", nproc=2, restarts=0, timeout_s=60):
        super().__init__(folder, [REPO / "tests" / "faulty_rank.py", fault, device, nproc, restarts, timeout_s])

    def works(self):
        """Wait until the ranks are in their loop."""
        self.until(lambda: self.out().startswith("working\n"))


slow = pytest.mark.slow
FAULTS = [  # the fault of rank 1, the exit code, what is said
    pytest.param("SIGKILL", 137, r"rank 1 was ended by signal 9 \(SIGKILL\): .*no memory left.*", id="killed"),
    pytest.param("SIGSEGV", 139, r"rank 1 was ended by signal 11 \(SIGSEGV\): native code.*", id="crashes", marks=slow),
    pytest.param("exits", 77, r"rank 1 exited with code 77", id="exits", marks=slow),
    pytest.param("reports", 3, r"rank 1: no luck left\npython -m launch.doctor .*", id="reports", marks=slow),
]  # fmt: skip


@pytest.mark.timeout(LIMIT_S + 20)
@pytest.mark.parametrize(("fault", "code", "says"), FAULTS)
def test_a_fault_is_named_in_one_line(fault, code, says, tmp_path):
    found, said = Launched(tmp_path, fault).end()
    assert found == code, said
    assert re.fullmatch(says, said.strip()), said


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S + 20)
def test_a_stopped_rank_is_named_and_killed(tmp_path):
    code, said = Launched(tmp_path, "SIGSTOP", nproc=3, timeout_s=4).end()
    assert code == 137
    found = re.fullmatch(
        r"rank 1 was stopped \(SIGSTOP\) for (\d+) s, longer than runtime.timeout_s=4, and was killed", said.strip()
    )
    assert found, said
    assert int(found[1]) <= 14, "the time-out and ten seconds"


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S + 20)
def test_a_rank_that_hangs_is_found_by_those_that_wait(tmp_path):
    code, said = Launched(tmp_path, "hangs", nproc=3, timeout_s=4).end()
    assert code == 5
    waited, running = said.strip().splitlines()
    assert re.fullmatch(
        r"rank [02] waited longer than runtime.timeout_s=4 s for another rank, .*\(.*4000ms.*\)", waited
    ), said
    assert running == "still running until then: rank 1"


@pytest.mark.timeout(LIMIT_S + 20)
def test_a_killed_rank_is_survived(tmp_path):
    """tests/test_faults.py kills rank 0 and torchrun too."""
    launched = Launched(tmp_path, "works", restarts=2)
    launched.works()
    launched.ranks()[1].kill()
    code, said = launched.end()
    assert code == 0, said
    assert re.fullmatch(
        r"rank 1 was ended by signal 9 .*; all ranks are started again \(restart 1 of 2\)", said.strip()
    )


@pytest.mark.gpu
@pytest.mark.timeout(LIMIT_S + 20)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_killed_rank_of_nccl_is_survived(tmp_path):
    launched = Launched(tmp_path, "works", device="cuda", restarts=1)
    launched.works()
    launched.ranks()[1].kill()
    code, said = launched.end()
    assert code == 0 and said.count("(restart 1 of 1)") == 1, said


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S + 20)
@pytest.mark.parametrize("victim", ["agent", "launcher"])
def test_a_killed_process_ends_the_run(victim, tmp_path):
    launched = Launched(tmp_path, "works")
    launched.works()
    if victim == "launcher":
        launched.process.kill()
    else:
        launched.agent().kill()
    code, said = launched.end()
    if victim == "launcher":
        assert (code, said) == (-9, "")
    else:
        assert code == 137 and re.fullmatch(
            r"torchrun's process was ended by signal 9 \(SIGKILL\): .*", said.strip()
        ), said


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S + 20)
def test_wrong_input_is_not_tried_again(tmp_path):
    code, said = Launched(tmp_path, "refuses", restarts=3).end()
    assert code == 2
    assert said == "1 problem, nothing was trained:\n  luck=0 is too small: use luck=1\n"


@pytest.mark.timeout(LIMIT_S + 20)
@pytest.mark.parametrize(
    "number", [signal.SIGINT, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGTERM, signal.SIGUSR1))]
)
def test_a_signal_to_the_launcher_reaches_the_ranks(number, tmp_path):
    launched = Launched(tmp_path, "works", restarts=3)
    launched.works()
    # as ctrl-C in a terminal does, to the whole process group, of which ranks and torchrun are no part
    os.killpg(launched.process.pid, number)
    code, said = launched.end()
    assert (code, said) == (128 + number, f"the run was ended by signal {number.value} ({number.name})\n")


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S + 20)
def test_a_second_interrupt_ends_at_once(tmp_path):
    launched = Launched(tmp_path, "deaf")
    launched.works()
    launched.process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert launched.process.poll() is None, "ranks that do not listen are waited for"
    launched.process.send_signal(signal.SIGINT)
    assert launched.end(limit_s=20) == (130, ""), "torchrun waits for 30 s"
