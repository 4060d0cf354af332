"""Ranks of data parallelism are killed while they train: the others go on at once, and the curve does not change.

Each test kills several, one after the other, because most of its time is the start of processes.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scripts.kill_ranks import BOUND, SMALL, difference, ended, last_step, launch, ranks_of, records, said
from scripts.kill_ranks import wait_until as wait_while_running
from tests import faults
from train.checkpoint.folder import complete
from train.checkpoint.manifest import Manifest, wrong_files
from train.command.process.life import is_alive

REPO = Path(__file__).resolve().parent.parent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
EVERY, VALIDATES = 10, 20  # steps: of SMALL
# with a constant rate the steps do not depend on how many follow
LINE = [*SMALL, "optim.schedule=constant"]
ELASTIC = [*LINE, "runtime.elastic=true"]
PATIENCE_S = 100

pytestmark = pytest.mark.timeout(200)
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Gives the records of so many first steps of a run on one rank, which nobody disturbs."""
    known: list[dict] = []

    def first(steps):
        if not known or known[-1]["step"] < steps:
            folder = tmp_path_factory.mktemp("elastic") / "undisturbed"
            most = -(-steps // VALIDATES) * VALIDATES  # it also validates after its last step
            with ended(process := launch(folder, 1, [*LINE, f"train.steps={most}", "checkpoint.every=0"])):
                process.wait(PATIENCE_S)
            assert process.returncode == 0, (folder / "log").read_text()
            known[:] = records(folder)
        return [one for one in known if one["step"] <= steps]

    return first


def waits(folder, process, happens):
    """Wait until it has happened, while the run goes on."""
    wait_while_running(process, happens)
    assert process.poll() is None, (folder / "log").read_text()[-4000:]


def reaches(folder, process, step):
    waits(folder, process, lambda: last_step(folder) >= step)


def processes_of(process):
    """Ranks, keepers and torchrun."""
    return psutil.Process(process.pid).children(recursive=True)


def is_well(folder, undisturbed, step, state):
    """The run has ended after this step with the results of an undisturbed one. Returns what it has said."""
    log, (run,) = (folder / "log").read_text(), (folder / "runs").iterdir()
    assert "Traceback" not in log, log
    assert difference(records(folder), undisturbed(step)) <= BOUND
    assert not is_alive(run) and faults.life_of(run).state == state
    assert not [path for path in run.rglob("*") if ".tmp" in path.name]
    return log


@slow
def test_lost_ranks_come_back(undisturbed, tmp_path):
    """The first rank is lost, which writes the run; then two, the second while the others form a new group; then all,
    so that the run goes on from a checkpoint of those that were left. A signal saves and ends it."""
    folder = tmp_path / "run"
    words = [*ELASTIC, "train.steps=100000", "checkpoint.mode=async", "metrics.tensorboard=true"]
    with ended(process := launch(folder, 4, words)):
        reaches(folder, process, EVERY)
        ranks_of(process)[0].kill()
        waits(folder, process, lambda: said(folder, 0, "back"))
        ranks = ranks_of(process)
        ranks[1].kill()
        time.sleep(0.4)
        ranks[3].kill()
        waits(folder, process, lambda: said(folder, 1, "lost") and said(folder, 3, "lost"))
        reaches(folder, process, said(folder, 3, "lost")[0] + 2 * EVERY)
        for rank in (0, 2):
            ranks[rank].kill()
        waits(folder, process, lambda: "continuing runs/" in (folder / "log").read_text())
        reaches(folder, process, last_step(folder) + EVERY)
        everything = processes_of(process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 75, (folder / "log").read_text()
    (step,) = re.findall(r"checkpoint saved at step (\d+): SIGTERM ended the run", (folder / "log").read_text())
    log = is_well(folder, undisturbed, int(step), "saved")
    assert "elastic: if a rank is lost, the others go on without it" in log
    assert re.search(r"^rank 0 \(process \d+\) was ended by SIGKILL and is started again$", log, re.M)
    assert re.search(r"^rank 0 lost after step \d+: 3 of 4 ranks go on with step \d+ \(", log, re.M)
    assert said(folder, 0, "back")[0] % EVERY == 0, "it joins after a saved step"
    (run,) = (folder / "runs").iterdir()
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    for tag in ("train/loss", "validation/loss"):
        assert [one.step for one in events.Scalars(tag)] == [one["step"] for one in records(folder) if tag in one]
    newest = complete(run)[0]
    assert newest.name == f"step-{step}" and not wrong_files(newest, Manifest.read(newest))
    assert not psutil.wait_procs(everything, timeout=10)[1], "something still runs"


@slow
def test_killed_keepers_are_a_restart(undisturbed, tmp_path):
    """That of a rank, and that which has the roll. Before that all ranks are killed, which have no checkpoint yet."""
    folder = tmp_path / "run"
    with ended(process := launch(folder, 2, ["restarts=2", *ELASTIC, "train.steps=60"])):
        reaches(folder, process, 3)
        for rank in ranks_of(process).values():
            rank.kill()
        waits(folder, process, lambda: "begins again, as it has no checkpoint" in (folder / "log").read_text())
        for number, place in enumerate((1, 0), start=1):
            reaches(folder, process, last_step(folder) + EVERY + 2)
            _, *everything = processes_of(process)
            psutil.Process(ranks_of(process)[place].ppid()).kill()
            waits(folder, process, lambda number=number: f"(restart {number} of 2)" in (folder / "log").read_text())
            assert not psutil.wait_procs(everything, timeout=10)[1], "something of the last start still runs"
        assert process.wait(PATIENCE_S) == 0, (folder / "log").read_text()
    log = is_well(folder, undisturbed, 60, "finished")
    assert all(f"rank {place} was ended by signal 9 (SIGKILL)" in log for place in (0, 1))
    assert len(re.findall(r"^continuing runs/.* after step \d+0$", log, re.M)) == 2 and log.count("begins again") == 1


@slow
def test_the_others_reach_the_end_under_plain_torchrun(undisturbed, tmp_path):
    """The lost rank is back when the run is complete, so it ends too."""
    folder = tmp_path / "run"
    folder.mkdir()
    how = ["-m", "torch.distributed.run", "--standalone", "--local_addr=127.0.0.1", "--nproc_per_node=2"]
    line = [sys.executable, *how, str(REPO / "train" / "main.py"), *ELASTIC, "train.steps=60"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(line, cwd=folder, env=ENV, stdout=log, stderr=log, start_new_session=True)
    with ended(process):
        reaches(folder, process, EVERY)
        ranks_of(process)[1].kill()
        assert process.wait(PATIENCE_S) == 0, (folder / "log").read_text()
    is_well(folder, undisturbed, 60, "finished")
    assert said(folder, 1, "lost") and not said(folder, 1, "back")


@pytest.mark.timeout(60)
def test_without_torchrun_it_is_refused(tmp_path):
    line = [sys.executable, str(REPO / "train" / "main.py"), "strategy=dp", "runtime.elastic=true"]
    run = subprocess.run(line, cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=50)
    assert run.returncode == 3 and "runtime.elastic=true needs torchrun: start it by torchrun or" in run.stderr
    assert not [*tmp_path.iterdir()]
