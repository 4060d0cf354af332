"""However a launcher, a sweep or torchrun ends, no rank keeps running. A sweep's point has one world and one folder."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launch.start.alive import RANKS, StillAlive, wait_for_ranks
from launch.sweeping.points import Entry
from train.command.process.parent import share_lock
from train.config.world import LOCK

REPO = Path(__file__).resolve().parent.parent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
ENDLESS = [
    "nproc=2", "runtime.device=cpu", "train.steps=100000", "model.num_layers=1", "train.eval_every=0",
    "train.eval_batches=1", "train.seq_len=16", "metrics.profile_every=0", "metrics.tensorboard=false",
]  # fmt: skip
PATIENCE_S = 120


@pytest.fixture
def started(tmp_path):
    """Starts a tool in tmp_path, and ends all its remaining processes at the end of the test."""
    processes = []

    def start(*line):
        with (tmp_path / "output").open("w") as output:
            processes.append(subprocess.Popen(
                [sys.executable, *line], cwd=tmp_path, env=ENV, stdout=output, stderr=output, start_new_session=True
            ))  # fmt: skip
        return processes[-1]

    yield start
    for process in processes:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


def trains(folder, pattern, after=0.0):
    """Waits for a step that was written after this time. Returns the folder of its run."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        for file in folder.glob(f"runs/{pattern}/metrics.jsonl"):
            if file.stat().st_size and file.stat().st_mtime > after:
                return file.parent
        time.sleep(0.1)
    raise AssertionError((folder / "output").read_text())


def ranks_of(process):
    """The processes that are ranks of the world that this process started."""
    found = psutil.Process(process.pid).children(recursive=True)
    return [one for one in found if "RANK" in one.environ()]


def gone(processes):
    _, alive = psutil.wait_procs(processes, timeout=30)
    return not alive


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_sweep_that_is_asked_to_quit_leaves_no_rank_and_the_same_line_one_folder(started, tmp_path):
    """tests/test_killed_sweep.py kills it, at several moments."""
    line = ["-m", "launch.sweep", "strategy=dp,fsdp", *ENDLESS]
    first = started(*line)
    trains(tmp_path, "dp-*")
    family = psutil.Process(first.pid).children(recursive=True)
    assert len(family) == 3, "torchrun and two ranks"
    first.send_signal(signal.SIGQUIT)
    asked = time.time()
    assert gone(family), "something trains on"
    first.wait(30)
    started(*line)
    again = trains(tmp_path, "dp-*", after=asked)
    assert [path.name for path in (tmp_path / "runs").glob("dp-*")] == [again.name], "two folders stand for a point"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ranks_end_with_the_torchrun_of_a_sweep_which_goes_on(started, tmp_path):
    """That of the first point is killed, and that of the second gets a signal which it does not know."""
    sweep = started("-m", "launch.sweep", "strategy=dp,fsdp", *ENDLESS)
    for name, number in (("dp", signal.SIGKILL), ("fsdp", signal.SIGUSR1)):
        trains(tmp_path, f"{name}-*")
        ranks = ranks_of(sweep)
        assert len(ranks) == 2
        ranks[0].parent().send_signal(number)
        assert gone(ranks), "something trains on"
    assert sweep.wait(PATIENCE_S) == 1, (tmp_path / "output").read_text()
    (points,) = tmp_path.glob("runs/sweep-*/points.json")
    statuses = [(point["status"], point["exit_code"]) for point in json.loads(points.read_text())["points"]]
    # torchrun passes the second on, and ends in order
    assert statuses == [("failed", -signal.SIGKILL), ("failed", 128 + signal.SIGUSR1)]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ranks_end_with_a_torchrun_that_ends_by_a_signal(started, tmp_path):
    """Bare torchrun. tests/test_launcher_faults.py kills a launcher, tests/test_fault_signals.py torchrun, and the
    latter sends this signal to a launcher."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(REPO / "train" / "main.py")]
    launcher = started(*torchrun, "strategy=dp", *ENDLESS[1:])
    trains(tmp_path, "dp-*")
    ranks = ranks_of(launcher)
    assert len(ranks) == 2
    launcher.send_signal(signal.SIGUSR1)
    assert gone(ranks), "something trains on"


MIDDLE = """
import os, subprocess, sys, time
child = "import os, sys, time; from train.command.process.parent import die_with; die_with(int(sys.argv[1]))"
subprocess.Popen([sys.executable, "-c", child + "; print(1, flush=True); time.sleep(60)", str(os.getpid())])
time.sleep(60)
"""


@pytest.mark.timeout(60)
def test_the_kernel_ends_a_child_with_its_parent():
    middle = subprocess.Popen([sys.executable, "-c", MIDDLE], env=ENV, stdout=subprocess.PIPE)
    assert middle.stdout is not None and middle.stdout.readline() == b"1\n"
    children = psutil.Process(middle.pid).children()
    middle.kill()
    middle.wait()
    assert gone(children)
    middle.stdout.close()


@pytest.mark.timeout(60)
def test_a_child_whose_parent_has_ended_already_does_not_start():
    code = (
        "from train.command.process.parent import die_with; die_with(1 + __import__('os').getppid()); print('trains')"
    )
    run = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True, timeout=50)
    assert (run.returncode, run.stdout) == (3, "")
    assert "has ended" in run.stderr and "Traceback" not in run.stderr


@pytest.mark.timeout(60)
def test_what_still_lives_is_named_and_nothing_is_measured_beside_it(tmp_path):
    lock = str((tmp_path / RANKS).resolve())
    code = "import sys, time; from train.command.process.parent import share_lock; share_lock(sys.argv[1])"
    code += "; print(1, flush=True); time.sleep(60)"
    rank = subprocess.Popen([sys.executable, "-c", code, lock], env=ENV | {LOCK: lock}, stdout=subprocess.PIPE)
    assert rank.stdout is not None
    try:
        assert rank.stdout.readline() == b"1\n"
        with pytest.raises(StillAlive, match=rf"processes {rank.pid} .*still run.*kill -9 {rank.pid}\)") as end:
            wait_for_ranks(tmp_path, patience_s=0.2)
        assert end.value.exit_code == 3
    finally:
        rank.kill()
        rank.wait()
        rank.stdout.close()
    wait_for_ranks(tmp_path)
    os.close(share_lock(lock))  # the sweep's own is given back


@pytest.mark.timeout(60)
def test_only_the_folder_of_a_run_that_was_cut_off_is_removed(tmp_path):
    sweep = tmp_path / "runs" / "sweep-abcdef"
    names = (
        "dp-dp_replicate2-ws2-abcdef",
        "dp-dp_replicate2-ws2-abcdef-2",
        "notes",
        "sweep-abcdef/probes/dp-ws2-012345",
    )
    cut_off, done, foreign, probe = (tmp_path / "runs" / name for name in names)
    outside = tmp_path / "dp-ws2-abcdef"
    for path in (cut_off, done, foreign, probe, outside):
        path.mkdir(parents=True)
        (path / "metrics.jsonl").touch()
    (done / "summary.json").write_text("{}")
    entry = Entry("dp", [], 2, "dp.log")
    for path in (cut_off, probe):
        (sweep / entry.run_file).write_text(f"{path}\n")
        assert entry.discard(sweep) == path
        assert not path.exists()
    for path in (done, foreign, outside, sweep.parent, tmp_path / "nothing"):
        (sweep / entry.run_file).write_text(f"{path}\n")
        assert entry.discard(sweep) is None
    assert done.exists() and foreign.exists() and outside.exists()
