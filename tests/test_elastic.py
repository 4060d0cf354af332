"""Ranks of data parallelism are killed while they train: the others go on at once, and the curve does not change."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scripts.kill_ranks import BOUND, SMALL, difference, ended, kill_one, last_step, launch, ranks_of, records, said
from scripts.kill_ranks import wait_until as wait_while_running
from tests import faults
from train.checkpoint.folder import complete
from train.checkpoint.manifest import Manifest, wrong_files
from train.command.process.life import is_alive

REPO = Path(__file__).resolve().parent.parent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
STEPS, EVERY = 240, 10
LINE = [*SMALL, f"train.steps={STEPS}", f"checkpoint.every={EVERY}", "metrics.tensorboard=true"]
ELASTIC = [*LINE, "runtime.elastic=true"]
NPROC, GO_ON_S, PATIENCE_S = 4, 5.0, 150


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The records of a run without a fault."""
    folder = tmp_path_factory.mktemp("elastic") / "undisturbed"
    with ended(process := launch(folder, NPROC, LINE)):
        process.wait(PATIENCE_S)
    assert process.returncode == 0, (folder / "log").read_text()
    return records(folder)


@pytest.fixture
def start(tmp_path):
    """Starts a run, of which nothing is left at the end of the test. Gives its folder and the launcher's process."""
    started = []

    def run(*words):
        folder = tmp_path / "run"
        started.append(launch(folder, NPROC, words))
        return folder, started[-1]

    yield run
    for process in started:
        with ended(process):
            pass


def reaches(folder, process, step):
    wait_while_running(process, lambda: last_step(folder) >= step)
    assert process.poll() is None, (folder / "log").read_text()[-4000:]


def processes_of(process):
    """Ranks, keepers and torchrun."""
    return psutil.Process(process.pid).children(recursive=True)


def ends_well(folder, process, undisturbed, everything=()):
    """Check that the run ends as the undisturbed one, and that nothing is left."""
    process.wait(PATIENCE_S)
    log = (folder / "log").read_text()
    assert process.returncode == 0 and "Traceback" not in log, log
    assert difference(records(folder), undisturbed) <= BOUND
    (run,) = (folder / "runs").iterdir()
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    for tag in ("train/loss", "validation/loss"):
        assert [one.step for one in events.Scalars(tag)] == [one["step"] for one in undisturbed if tag in one]
    assert complete(run)[0].name == f"step-{STEPS}" and not wrong_files(
        complete(run)[0], Manifest.read(complete(run)[0])
    )
    assert not [path for path in (run / "checkpoints").iterdir() if ".tmp" in path.name]
    assert not is_alive(run) and faults.life_of(run).state == "finished"
    assert not psutil.wait_procs(everything, timeout=10)[1], "something still runs"
    return log


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", [1, 2])
def test_the_others_go_on_and_a_killed_rank_comes_back(seed, undisturbed, start):
    folder, process = start(*ELASTIC)
    reaches(folder, process, EVERY)
    killed = kill_one(folder, process, 1, random.Random(seed))
    assert killed is not None and killed.seconds < GO_ON_S
    log = ends_well(folder, process, undisturbed, processes_of(process))
    assert "elastic: if a rank is lost, the others go on without it" in log
    assert re.search(rf"^rank {killed.rank} \(process \d+\) was ended by SIGKILL and is started again$", log, re.M)
    assert re.search(rf"^rank {killed.rank} lost after step \d+: 3 of 4 ranks go on with step \d+ \(", log, re.M)
    (back,) = said(folder, killed.rank, "back")
    assert back % EVERY == 0, "it joins after a saved step"


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("pause_s", [0.0, 0.4])  # at once, and while the others form a new group
def test_two_ranks_are_killed(pause_s, undisturbed, start):
    folder, process = start(*ELASTIC, "checkpoint.mode=async")
    reaches(folder, process, EVERY)
    ranks = ranks_of(process)
    ranks[0].kill()
    time.sleep(pause_s)
    ranks[3].kill()
    ends_well(folder, process, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_all_ranks_are_killed(undisturbed, start):
    """Nobody has the state any more, so the same run goes on from its newest checkpoint."""
    folder, process = start(*ELASTIC)
    reaches(folder, process, EVERY + 2)
    for rank in ranks_of(process).values():
        rank.kill()
    log = ends_well(folder, process, undisturbed)
    assert len(re.findall(r"^continuing runs/.* after step \d+0$", log, re.M)) == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_without_checkpoints_a_rank_joins_at_the_next_step(undisturbed, start):
    folder, process = start(*ELASTIC, "checkpoint.every=0")
    reaches(folder, process, EVERY)
    killed = kill_one(folder, process, 1, random.Random(3))
    process.wait(PATIENCE_S)
    assert killed is not None and said(folder, killed.rank, "back")
    assert process.returncode == 0 and difference(records(folder), undisturbed) <= BOUND


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_stopped_rank_is_killed_and_comes_back(undisturbed, start):
    folder, process = start(*ELASTIC, "runtime.timeout_s=4", "train.steps=240")
    reaches(folder, process, EVERY)
    ranks_of(process)[1].send_signal(signal.SIGSTOP)
    log = ends_well(folder, process, undisturbed)
    assert re.search(r"^rank 1 \(process \d+\) has been stopped \(SIGSTOP\) for 4 s and is killed$", log, re.M)
    assert "rank 1 lost after step" in log


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("place", [0, 1])
def test_a_killed_keeper_is_a_restart(place, undisturbed, start):
    folder, process = start("restarts=1", *ELASTIC)
    reaches(folder, process, EVERY + 2)
    everything = processes_of(process)
    psutil.Process(ranks_of(process)[place].ppid()).kill()
    log = ends_well(folder, process, undisturbed, everything)
    assert f"rank {place} was ended by signal 9 (SIGKILL)" in log and "(restart 1 of 1)" in log
    assert len(re.findall(r"^continuing runs/.* after step \d+0$", log, re.M)) == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_also_after_a_loss(number, undisturbed, start):
    folder, process = start(*ELASTIC)
    reaches(folder, process, EVERY)
    everything = processes_of(process)
    killed = kill_one(folder, process, 1, random.Random(4))
    assert killed is not None
    process.send_signal(number)
    assert process.wait(PATIENCE_S) == 75, (folder / "log").read_text()
    log = (folder / "log").read_text()
    assert log.count("checkpoint saved at step ") == 1 and f"{number.name} ended the run" in log, log
    assert not psutil.wait_procs(everything, timeout=10)[1]
    with ended(again := launch(folder, NPROC, ELASTIC)):
        ends_well(folder, again, undisturbed)


def torchrun(folder, *words):
    """Start two ranks without launch.local."""
    folder.mkdir()
    how = ["-m", "torch.distributed.run", "--standalone", "--local_addr=127.0.0.1", "--nproc_per_node=2"]
    line = [sys.executable, *how, str(REPO / "train" / "main.py"), *LINE, "metrics.tensorboard=false", *words]
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(line, cwd=folder, env=ENV, stdout=log, stderr=log, start_new_session=True)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_all_ranks_are_killed_before_a_checkpoint(tmp_path):
    """The run begins again in its own directory, also if torchrun alone has started it."""
    folder = tmp_path / "killed"
    with ended(process := torchrun(folder, "train.steps=60", "checkpoint.every=50", "runtime.elastic=true")):
        reaches(folder, process, 3)
        for rank in ranks_of(process).values():
            rank.kill()
        code = process.wait(PATIENCE_S)
    log = (folder / "log").read_text()
    assert code == 0 and log.count("begins again, as it has no checkpoint") == 1, log
    run = faults.run_in(folder)
    assert [one["step"] for one in records(folder) if "train/loss" in one] == [*range(1, 61)]
    assert faults.life_of(run).state == "finished" and not is_alive(run)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_under_plain_torchrun(tmp_path):
    curves = []
    for name, more in (("plain", []), ("killed", ["runtime.elastic=true"])):
        folder = tmp_path / name
        with ended(process := torchrun(folder, "train.steps=120", *more)):
            if more:
                reaches(folder, process, EVERY)
                ranks_of(process)[1].kill()
            assert process.wait(PATIENCE_S) == 0, (folder / "log").read_text()
        curves.append(records(folder))
    assert said(tmp_path / "killed", 1, "lost") and difference(*curves) <= BOUND


@pytest.mark.timeout(60)
def test_without_torchrun_it_is_refused(tmp_path):
    line = [sys.executable, str(REPO / "train" / "main.py"), "strategy=dp", "runtime.elastic=true"]
    run = subprocess.run(line, cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=50)
    assert run.returncode == 3 and "runtime.elastic=true needs torchrun: start it by torchrun or" in run.stderr
    assert not [*tmp_path.iterdir()]
