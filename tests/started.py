"""A program that a test starts, with all its processes and files: nothing of them may be left behind."""

import os
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

import psutil

from launch.start.alive import with_variable

REPO = Path(__file__).resolve().parent.parent
MARK = "STRATEGY_LAB_TEST"  # in the environment of everything that a program starts
SHARED_MEMORY = Path("/dev/shm")
LIMIT_S = 100
GONE_S = 10  # a killed process, and what other tests have in /dev/shm, take a moment to go


class Started:
    """A Python program in `folder`, which is also where its output and its temporary files are."""

    def __init__(self, folder, words, prefix=()):
        """`prefix`: the command that starts it, with its arguments."""
        self.folder, self.mark, self.since = Path(folder), uuid.uuid4().hex, time.time()
        self.output, self.errors = (self.folder / f"{self.mark}.{name}" for name in ("out", "err"))
        self.temporary = self.folder / f"{self.mark}.tmp"
        self.temporary.mkdir()
        self.on_gpu = bool({"cuda", "runtime.device=cuda"}.intersection(words))
        self.shared = self.in_shared_memory()
        paths = os.pathsep.join([str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])])
        own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "TMPDIR": str(self.temporary), MARK: self.mark}
        own["TORCHINDUCTOR_CACHE_DIR"] = str(self.folder / "cache")  # torch keeps it, by default in TMPDIR
        with self.output.open("w") as out, self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, *map(str, words)], cwd=folder, env=os.environ | own,
                stdout=out, stderr=errors, start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a background job ignores
            )  # fmt: skip

    def in_shared_memory(self):
        """What is there; without what other programs keep there for their GPUs, if this one uses none."""
        return {one for one in SHARED_MEMORY.iterdir() if self.on_gpu or not one.name.startswith("nccl")}

    def out(self):
        return self.output.read_text()

    def said(self):
        return self.errors.read_text()

    def until(self, happens):
        """Wait until the function returns something, and return it. The program must not end before that."""
        deadline = time.monotonic() + LIMIT_S
        while not (found := happens()):
            ended, late = self.process.poll() is not None, time.monotonic() > deadline
            if ended or late:
                self.kill()
                raise AssertionError(f"it {'ended' if ended else 'waits'}, after\n{self.out()}{self.said()}")
            time.sleep(0.02)
        return found

    def agent(self):
        """The process of torchrun that a launcher has started."""
        (found,) = psutil.Process(self.process.pid).children()
        return found

    def ranks(self):
        """The processes of the ranks, in order."""
        found = {}
        for one in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.Error):
                if "RANK" in (env := one.environ()):
                    found[int(env["RANK"])] = one
        return [found[rank] for rank in sorted(found)]

    def end(self, limit_s=LIMIT_S):
        """Wait for its end: (exit code, what was said on stderr). Nothing of it is left."""
        try:
            self.process.wait(limit_s)
        finally:
            alive = self.kill()
        assert not alive, f"processes were left behind: {alive}"
        assert not [*self.temporary.iterdir()], "temporary files were left behind"
        deadline = time.monotonic() + GONE_S
        while (left := self.in_shared_memory() - self.shared) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left, "shared memory was left behind"
        return self.process.returncode, self.said()

    def kill(self):
        """Kill what is left of it. Returns the processes that did not end soon by themselves."""
        if self.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        _, alive = psutil.wait_procs(with_variable(MARK, self.mark), timeout=GONE_S)
        for one in alive:
            with suppress(psutil.Error):
                one.kill()
        return alive
