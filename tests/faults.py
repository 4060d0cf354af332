"""Runs that are cut off (tests/test_faults.py): how they are started, and what must be left of them."""

import json
import os
import subprocess
import time
import uuid
from contextlib import suppress
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.faulty_main import GO, WAITING
from tests.started import GONE_S, REPO, Started
from train.checkpoint.folder import complete, step_of
from train.checkpoint.manifest import Manifest, wrong_files
from train.command.process.life import is_alive, read_life

EVERY, STEPS = 4, 24
TEXT = "".join(f"{number} is {'even' if number % 2 == 0 else 'odd'}.\n" for number in range(4000))
LINE = [
    *("strategy=dp", "runtime.device=cpu", "runtime.timeout_s=60", "model.num_layers=2", "model.dim=64"),
    *("model.dropout=0.1", "data=text", "data.path=text.txt", "train.seq_len=32", "train.eval_every=10"),
    *("train.eval_batches=1", f"train.steps={STEPS}", f"checkpoint.every={EVERY}", "metrics.profile_every=0"),
]
LONG_STEPS, LONG_EVERY = 200, 20  # without planted faults: long enough for a signal to come in between
LONG_LINE = [*LINE, f"train.steps={LONG_STEPS}", f"checkpoint.every={LONG_EVERY}", "train.eval_every=100"]
MAIN = REPO / "tests" / "faulty_main.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--local_addr=127.0.0.1", "--nproc_per_node=2"]


class Run(Started):
    """A run on `nproc` ranks in `folder`, with planted faults. `restarts`: None for bare torchrun on two, without
    launch.local. `line`: its overrides, before the `words`."""

    def __init__(self, folder, faults="none", *words, restarts=0, nproc=2, prefix=(), line=LINE):
        (folder / "text.txt").write_text(TEXT)
        self.faults = folder / uuid.uuid4().hex  # what has happened
        how = [*TORCHRUN, f"--log_dir={folder / 'torchrun'}"] if restarts is None else []  # it keeps that folder
        start = [] if restarts is None else [f"nproc={nproc}", f"restarts={restarts}"]
        super().__init__(folder, [*how, MAIN, faults, self.faults, *start, *line, *words], prefix)

    def go(self):
        """Let the ranks no longer wait in a step."""
        self.faults.mkdir(exist_ok=True)
        (self.faults / GO).touch()

    def stays(self):
        """Let those that have not come so far wait in a step again."""
        (self.faults / GO).unlink()

    def waits(self, times=1):
        """Wait until a rank waits in a step, after so many starts of the ranks. There is a checkpoint by then."""
        self.until(lambda: len([*self.faults.glob(f"{WAITING}*")]) >= times)


@pytest.fixture
def start(tmp_path):
    """Starts a run in tmp_path, and ends all its processes at the end of the test."""
    started = []

    def run(*args, **options):
        started.append(Run(tmp_path, *args, **options))
        return started[-1]

    yield run
    for one in started:
        one.kill()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The losses by step of a run without a fault."""
    folder = tmp_path_factory.mktemp("undisturbed")
    code, said = Run(folder).end()
    assert (code, said) == (0, "")
    return losses_of(run_in(folder))


@pytest.fixture(scope="session")
def undisturbed_long(tmp_path_factory):
    """The same of a longer run."""
    folder = tmp_path_factory.mktemp("undisturbed_long")
    assert Run(folder, line=LONG_LINE).end() == (0, "")
    return losses_of(run_in(folder))


def has_saved(folder):
    """The complete checkpoints of the runs in the folder."""
    return [*(folder / "runs").glob("*/checkpoints/step-*/manifest.json")]


class Disk:
    """A small disk, on which the runs of `folder` are: a tmpfs in a namespace of its own, so that no rights are needed.
    `prefix`: the command that starts a program there. `runs`: how a test sees the folder of the runs."""

    def __init__(self, folder, kib):
        self.place = folder / "runs"
        self.place.mkdir()
        line = ["unshare", "-Urm", "sh", "-c", "echo ready && exec sleep 1000"]
        self.holder = subprocess.Popen(line, stdout=subprocess.PIPE)
        assert self.holder.stdout is not None and self.holder.stdout.readline() == b"ready\n"
        pid = str(self.holder.pid)
        # the working directory must be entered again, for the new mount to be seen below it
        enter = ["nsenter", "--preserve-credentials", "-U", "-m", "-t", pid]
        self.prefix = [*enter, "sh", "-c", 'cd "$0" && exec "$@"', str(folder)]
        self.runs = Path(f"/proc/{pid}/root{self.place}")
        self.do("mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", self.place)

    def do(self, *line):
        subprocess.run([*self.prefix, *map(str, line)], check=True, timeout=20)

    def fill(self, but_kib=0):
        """Leave so much room."""
        free = os.statvfs(self.runs)
        size = free.f_bavail * free.f_bsize - but_kib * 2**10
        with suppress(OSError):
            (self.runs / "full").write_bytes(bytes(size))

    def make_room(self):
        (self.runs / "full").unlink()

    def read_only(self):
        """For every file that is opened from now on."""
        self.do("mount", "--bind", self.place, self.place)
        self.do("mount", "-o", "remount,bind,ro", self.place)

    def writable(self):
        self.do("umount", self.place)

    def close(self):
        self.holder.kill()
        self.holder.wait()
        assert self.holder.stdout is not None
        self.holder.stdout.close()


@pytest.fixture
def disk(tmp_path):
    found = Disk(tmp_path, kib=16 * 2**10)
    yield found
    found.close()


def run_in(folder):
    (run,) = (folder / "runs").iterdir()
    return run


def life_of(run):
    life = read_life(run)
    assert life is not None
    return life


def newest_step(run):
    return max((step_of(path) or 0 for path in complete(run)), default=0)


def losses_of(run):
    """What each line of metrics.jsonl says of the numbers, with its step. A line that was cut off is left out."""
    lines = []
    for text in (run / "metrics.jsonl").read_text().splitlines(keepends=True):
        if text.endswith("\n"):
            line = json.loads(text)
            numbers = ("train/loss", "train/grad_norm", "validation/loss")
            lines.append((line["step"], {tag: line[tag] for tag in numbers if tag in line}))
    return lines


def is_saved(run, most=EVERY):
    """The newest checkpoint is as it was written, and at most so many steps old."""
    good = [path for path in complete(run) if not wrong_files(path, Manifest.read(path))]
    last = losses_of(run)[-1][0]
    assert good and last - step_of(good[0]) <= most, (last, good)


def is_whole(run, undisturbed):
    """The run has come to its end as if nothing had happened, and nothing unfinished is left in its folder."""
    assert losses_of(run) == undisturbed
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [*range(1, STEPS + 1)]
    assert [path.name for path in run.rglob("*") if ".tmp" in path.name] == []
    assert newest_step(run) == STEPS and life_of(run).state == "finished" and not is_alive(run)


def goes_on(start, run, undisturbed, **options):
    """The same line continues this run, which is not alive and has not ended by itself, to the end."""
    is_saved(run)
    deadline = time.monotonic() + GONE_S  # a process that is ending has its lock a moment longer than its environment
    while is_alive(run) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_alive(run) and life_of(run).state in ("running", "saved")
    again = start(**options)
    code, said = again.end()
    assert (code, said) == (0, "")
    assert f"continuing runs/{run.name} after step " in again.out()
    is_whole(run, undisturbed)
