"""A keeper starts its rank again when it is killed, ends with its exit code, and passes signals on."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

REPO = Path(__file__).resolve().parent.parent
ENV = os.environ | {"PYTHONPATH": str(REPO)}
LINE = [sys.executable, str(REPO / "tests" / "kept.py")]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("ends", "code", "starts"),
    [
        (["0"], 0, 1),
        (["3"], 3, 1),  # an error of its own
        (["-9", "0"], 0, 2),
        (["-11", "3", "0"], 0, 3),  # the others do well without one that was started again, so it has more tries
    ],
)
def test_a_rank_that_is_killed_is_started_again(ends, code, starts, tmp_path):
    run = subprocess.run([*LINE, str(tmp_path / "log"), *ends], env=ENV, capture_output=True, text=True, timeout=50)
    assert run.returncode == code, run.stderr
    assert len((tmp_path / "log").read_text().splitlines()) == starts
    assert run.stderr.count("is started again") == starts - 1 == len(run.stderr.splitlines())


@pytest.mark.timeout(60)
def test_a_rank_that_is_stopped_is_killed_and_started_again(tmp_path):
    line = [*LINE, str(tmp_path / "log"), str(-signal.SIGSTOP), "0"]
    run = subprocess.run(line, env=ENV, capture_output=True, text=True, timeout=50)
    assert run.returncode == 0
    assert re.sub(r"process \d+", "process N", run.stderr).splitlines() == [
        "rank 0 (process N) has been stopped (SIGSTOP) for 2 s and is killed",
        "rank 0 (process N) was ended by SIGKILL and is started again",
    ]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_rank_ends_with_its_keeper(number, tmp_path):
    log = tmp_path / "log"
    keeper = subprocess.Popen([*LINE, str(log), "sleeps"], env=ENV)
    deadline = time.monotonic() + 30
    while not (log.exists() and log.read_text().endswith("\n")) and time.monotonic() < deadline:
        time.sleep(0.05)
    rank = psutil.Process(int(log.read_text()))
    keeper.send_signal(number)
    assert keeper.wait(20) == (-9 if number == signal.SIGKILL else 128 + signal.SIGTERM)
    assert not psutil.wait_procs([rank], 10)[1]
