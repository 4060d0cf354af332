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

from scripts.soaking.kill_ranks import BOUND, SMALL, difference, ended, last_step, launch, log_of, ranks_of, said
from scripts.soaking.kill_ranks import wait_until as wait_while_running
from scripts.soaking.run import lines
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
            assert process.returncode == 0, log_of(folder)
            known[:] = lines(folder)
        return [one for one in known if one["step"] <= steps]

    return first


def waits(folder, process, happens):
    """Wait until it has happened, while the run goes on."""
    wait_while_running(process, happens)
    assert process.poll() is None, log_of(folder)[-4000:]


def reaches(folder, process, step):
    waits(folder, process, lambda: last_step(folder) >= step)


def processes_of(process):
    """Ranks, keepers and torchrun."""
    return psutil.Process(process.pid).children(recursive=True)


def is_well(folder, undisturbed, step, state):
    """The run has ended after this step with the results of an undisturbed one. Returns what it has said."""
    log, (run,) = log_of(folder), (folder / "runs").iterdir()
    assert "Traceback" not in log, log
    assert difference(lines(folder), undisturbed(step)) <= BOUND
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
        waits(folder, process, lambda: said(log_of(folder), 0, "back"))
        ranks = ranks_of(process)
        ranks[1].kill()
        time.sleep(0.4)
        ranks[3].kill()
        waits(folder, process, lambda: said(log_of(folder), 1, "lost") and said(log_of(folder), 3, "lost"))
        reaches(folder, process, said(log_of(folder), 3, "lost")[0] + 2 * EVERY)
        for rank in (0, 2):
            ranks[rank].kill()
        waits(folder, process, lambda: "continuing runs/" in log_of(folder))
        reaches(folder, process, last_step(folder) + EVERY)
        everything = processes_of(process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 75, log_of(folder)
    (step,) = re.findall(r"checkpoint saved at step (\d+): SIGTERM ended the run", log_of(folder))
    log = is_well(folder, undisturbed, int(step), "saved")
    assert "elastic: if a rank is lost, the others go on without it" in log
    assert re.search(r"^rank 0 \(process \d+\) was ended by SIGKILL and is started again$", log, re.M)
    assert re.search(r"^rank 0 lost after step \d+: 3 of 4 ranks go on with step \d+ \(", log, re.M)
    assert said(log_of(folder), 0, "back")[0] % EVERY == 0, "it joins after a saved step"
    (run,) = (folder / "runs").iterdir()
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    for tag in ("train/loss", "validation/loss"):
        assert [one.step for one in events.Scalars(tag)] == [one["step"] for one in lines(folder) if tag in one]
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
        waits(folder, process, lambda: "begins again, as it has no checkpoint" in log_of(folder))
        for number, place in enumerate((1, 0), start=1):
            reaches(folder, process, last_step(folder) + EVERY + 2)
            _, *everything = processes_of(process)
            psutil.Process(ranks_of(process)[place].ppid()).kill()
            waits(folder, process, lambda number=number: f"(restart {number} of 2)" in log_of(folder))
            assert not psutil.wait_procs(everything, timeout=10)[1], "something of the last start still runs"
        assert process.wait(PATIENCE_S) == 0, log_of(folder)
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
        assert process.wait(PATIENCE_S) == 0, log_of(folder)
    is_well(folder, undisturbed, 60, "finished")
    assert said(log_of(folder), 1, "lost") and not said(log_of(folder), 1, "back")


@slow
def test_ranks_are_killed_at_moments_of_a_save(undisturbed, tmp_path):
    """One after the other, each while those that are left make up the save that the last one has prevented."""
    names = ("killed_while_writing", "killed_before_the_manifest", "killed_before_latest")
    run = faults.Run(tmp_path, ",".join(names), "train.steps=40", line=ELASTIC, nproc=4)
    code, errors = run.end()
    assert code == 0 and "Traceback" not in errors, errors
    assert sorted(path.name for path in run.faults.iterdir()) == sorted(names)
    assert errors.count("was ended by SIGKILL and is started again") == len(names), errors
    found = faults.run_in(tmp_path)
    assert [path.name for path in complete(found)] == ["step-40", "step-30"]
    assert not [path for path in found.rglob("*") if ".tmp" in path.name]
    assert difference(lines(tmp_path), undisturbed(40)) <= BOUND


@slow
def test_a_replica_goes_on_when_the_other_one_is_broken(undisturbed, tmp_path):
    """A rank of hsdp ends when some ranks have made an update and others have not: those make it too. The replica comes
    back when it is whole; without checkpoints, after any step."""
    words = ("strategy=hsdp", "strategy.dp_replicate=2", "train.steps=100000", "checkpoint.every=0")
    run = faults.Run(tmp_path, "half_voted", *words, line=ELASTIC, nproc=4)
    run.until(lambda: said(run.out(), 2, "back"))
    last = said(run.out(), 2, "back")[0] + EVERY
    run.until(lambda: last_step(tmp_path) >= last)
    run.process.send_signal(signal.SIGTERM)
    code, errors = run.end()
    assert code == 128 + signal.SIGTERM and "Traceback" not in errors, errors
    found = lines(tmp_path)
    assert difference(found, undisturbed(found[-1]["step"])) <= BOUND
    assert re.search(r"^ranks 2, 3 lost after step 10: 2 of 4 ranks go on with step 11 \(", run.out(), re.M)
    ranks = {one["step"]: one["elastic/ranks"] for one in found if "elastic/ranks" in one}
    assert (ranks[8], ranks[12], ranks[last]) == (4, 2, 4)


@slow
def test_an_error_of_a_rank_ends_the_run_with_one_traceback(tmp_path):
    code, errors = faults.Run(tmp_path, "raises", line=ELASTIC).end()
    assert code == 1 and errors.count("RuntimeError: a planted error") == 1, errors
    assert "again" not in errors


@pytest.mark.timeout(60)
def test_without_torchrun_it_is_refused(tmp_path):
    line = [sys.executable, str(REPO / "train" / "main.py"), "strategy=dp", "runtime.elastic=true"]
    run = subprocess.run(line, cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=50)
    assert run.returncode == 3 and "runtime.elastic=true needs torchrun: start it by torchrun or" in run.stderr
    assert not [*tmp_path.iterdir()]
