"""The processes of `launch.doctor` that may hang or crash: each is given up in time, and says how it ended."""

import json
import os
import subprocess
import sys
import time

import psutil
import pytest

from launch.examine.child import Child
from tests.test_doctor import ENV

HANGS = """
import subprocess, sys, time
from launch.examine.child import begin, say
asked = begin()
say(asked=asked, pid=subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid)
print("a line of another program", flush=True)
open(asked["said"], "w").close()
time.sleep(60)
"""


@pytest.mark.timeout(40)
def test_a_part_that_hangs_is_given_up_with_all_its_processes(tmp_path, monkeypatch):
    (tmp_path / "hangs.py").write_text(HANGS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    child = Child("hangs", {"said": str(tmp_path / "said")}, os.environ)
    wait_until((tmp_path / "said").exists)
    answers = child.answers(time.monotonic() + 0.2)
    assert answers.late and answers.end.startswith("it did not answer within ") and answers.found["asked"]
    wait_until(lambda: not _alive(answers.found["pid"]) and not _alive(child.process.pid))


@pytest.mark.timeout(40)
def test_an_answer_that_came_in_time_is_read_after_the_deadline(tmp_path, monkeypatch):
    (tmp_path / "ends.py").write_text("from launch.examine.child import say\nsay(found=1)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Child("ends", None, os.environ) as child:
        wait_until(lambda: not _alive(child.process.pid))
        answers = child.answers(time.monotonic() - 1)
    assert (answers.found, answers.end, answers.late) == ({"found": 1}, "", False)


@pytest.mark.timeout(40)
def test_a_part_that_nobody_waits_for_ends_with_the_doctor(tmp_path, monkeypatch):
    (tmp_path / "sleeps.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Child("sleeps", None, os.environ) as child:
        pass
    wait_until(lambda: not _alive(child.process.pid))


def wait_until(done):
    deadline = time.monotonic() + 15
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _alive(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.timeout(40)
def test_a_part_that_crashes_says_how(tmp_path, monkeypatch):
    (tmp_path / "crashes.py").write_text("import os, sys\nprint('last words', file=sys.stderr)\nos.abort()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    deadline = time.monotonic() + 30
    assert Child("crashes", None, os.environ).answers(deadline).end == "it ended with signal 6: last words"
    assert "No module named no_such" in Child("no_such", None, os.environ).answers(deadline).end


RANKS = """
import os, time
from functools import partial
from launch.examine import ranks

def raises():
    raise RuntimeError("the cause\\nand more")

ranks.STAGE_S = 1.5
ranks._run([dict, raises, os.abort, partial(time.sleep, 60)], ["good", "raises", "lost", "hangs"])
"""


@pytest.mark.timeout(40)
def test_each_rank_that_fails_says_how():
    done = subprocess.run([sys.executable, "-c", RANKS], env=ENV, capture_output=True, text=True, timeout=30)
    found = {name: answer for line in done.stdout.splitlines() for name, answer in json.loads(line).items()}
    assert found == {
        "good": {},
        "raises": {"error": "RuntimeError: the cause"},
        "lost": {"error": "its process was ended by signal 6", "lost": True},
        "hangs": {"error": "it took longer than 1.5 s"},
    }
