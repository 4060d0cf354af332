"""Runs that are cut off (tests/test_faults.py): how they are started, and what must be left of them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train.checkpoint.folder import CHECKPOINTS, complete, step_of
from train.checkpoint.manifest import Manifest, wrong_files
from train.command.process.life import is_alive, read_life

REPO = Path(__file__).resolve().parent.parent
PATHS = os.pathsep.join([str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])])
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS}
EVERY, STEPS = 4, 40
LINE = [
    *(
        "strategy=dp",
        "runtime.device=cpu",
        "model.num_layers=2",
        "model.dim=64",
        "train.seq_len=32",
        "model.dropout=0.1",
    ),
    *("train.eval_every=10", "train.eval_batches=1", f"train.steps={STEPS}", f"checkpoint.every={EVERY}"),
    *("metrics.profile_every=0", "runtime.timeout_s=30"),
]
PATIENCE_S = 100


def torchrun(folder, fault, *more):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local_addr=127.0.0.1"]
    script = ["--nproc_per_node=2", str(REPO / "tests" / "faulty_main.py"), fault, str(folder / "marker")]
    line = [*torchrun, *script, *LINE, *more]
    pipe = subprocess.PIPE
    return subprocess.Popen(line, cwd=folder, env=ENV, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


@pytest.fixture
def start(tmp_path):
    """Starts a run in tmp_path, and ends all its processes at the end of the test."""
    started = []

    def run(fault="none", *more):
        started.append(torchrun(tmp_path, fault, *more))
        return started[-1]

    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The losses by step of a run without a fault."""
    folder = tmp_path_factory.mktemp("undisturbed")
    process = torchrun(folder, "none")
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, errors
    return losses_of(run_in(folder))


def run_in(folder):
    (run,) = (folder / "runs").iterdir()
    return run


def life_of(run):
    life = read_life(run)
    assert life is not None
    return life


def losses_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        (line["step"], {tag: line[tag] for tag in ("train/loss", "train/grad_norm", "validation/loss") if tag in line})
        for line in lines
    ]


def reaches(process, folder, step):
    """Wait until the run has a checkpoint of this step or a later one. Returns the run."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        for run in (folder / "runs").glob("*"):
            if (run / CHECKPOINTS / "latest").exists() and (step_of(complete(run)[0]) or 0) >= step:
                return run
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    raise AssertionError("no checkpoint")


def ranks_of(process):
    found = psutil.Process(process.pid).children(recursive=True)
    return sorted((one for one in found if "RANK" in one.environ()), key=lambda one: int(one.environ()["RANK"]))


def nothing_is_lost(run, process, start, undisturbed, *, resumes=True):
    """Check what is left, and that the same line continues to the end of the undisturbed run."""
    out, errors = process.communicate(timeout=PATIENCE_S)
    good = [path for path in complete(run) if not wrong_files(path, Manifest.read(path))]
    last = losses_of(run)[-1][0]
    assert good and last - step_of(good[0]) <= EVERY, (last, good)
    assert not is_alive(run) and life_of(run).state in ("running", "saved")
    if resumes:
        again = start()
        _, problems = again.communicate(timeout=PATIENCE_S)
        assert again.returncode == 0, problems
        assert losses_of(run) == undisturbed
        events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
        assert [event.step for event in events.Scalars("train/loss")] == [*range(1, STEPS + 1)]
        assert [path.name for path in (run / CHECKPOINTS).iterdir() if ".tmp" in path.name] == []
        assert life_of(run).state == "finished"
    return out, errors


def in_small_tmpfs(folder, kib, *more):
    """Run inside a user namespace, whose runs are on a tmpfs of this size."""
    (folder / "runs").mkdir()
    torchrun = f"{sys.executable} -m torch.distributed.run --standalone --local_addr=127.0.0.1 --nproc_per_node=2"
    line = " ".join([str(REPO / "train" / "main.py"), *LINE, *more])
    shell = f"mount -t tmpfs -o size={kib}k tmpfs {folder}/runs && {torchrun} {line}; ls -R {folder}/runs"
    command = ["unshare", "-Urm", "sh", "-c", shell]
    return subprocess.run(command, cwd=folder, env=ENV, capture_output=True, text=True, timeout=PATIENCE_S)
