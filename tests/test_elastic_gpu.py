"""Ranks are killed while they train on GPUs, over nccl: the other replica goes on, and the curve does not change."""

import re
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch

from scripts.soaking.kill_ranks import BOUND, SMALL, difference, ended, last_step, launch, log_of, ranks_of, said
from scripts.soaking.run import lines
from train.command.process.life import is_alive

LINE = [
    *SMALL,
    *("runtime.device=cuda", "train.global_batch_size=16", "train.steps=1000", "train.eval_every=50"),
    "checkpoint.every=20",
]
# seconds: until a run trains, until the others go on, until a killed rank is back, until both runs have ended
START_S, GO_ON_S, BACK_S, END_S = 50, 20, 40, 120

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(280)]


def on(strategy, size, *words):
    few = torch.cuda.device_count() < size
    return pytest.param(size, [strategy, *words], marks=pytest.mark.skipif(few, reason=f"needs {size} CUDA devices"))


def within(seconds, happens):
    """Wait until it has happened."""
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline, f"it has not happened within {seconds} s"
        time.sleep(0.02)


def show(process, folder):
    """Print the log of a run that hangs, after its ranks have shown where each of their threads is."""
    for number, rank in ranks_of(process).items():
        for thread in rank.threads():
            task = Path(f"/proc/{rank.pid}/task/{thread.id}")
            print(f"rank {number}, thread {thread.id}: {[(task / name).read_text() for name in ('comm', 'wchan')]}")
        rank.send_signal(signal.SIGABRT)
    time.sleep(2)
    print(f"last step: {last_step(folder)}\n{log_of(folder)[-20000:]}")


@pytest.mark.parametrize(
    ("size", "words"), [on("strategy=dp", 2), on("strategy=hsdp", 4, "strategy.dp_replicate=2")], ids=["dp", "hsdp"]
)
def test_the_other_replica_goes_on_over_nccl(size, words, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONFAULTHANDLER", "1")
    plain, folder, seconds = tmp_path / "plain", tmp_path / "killed", []
    line = [*LINE, *words]
    undisturbed, process = launch(plain, size, line), launch(folder, size, [*line, "runtime.elastic=true"])
    with ended(undisturbed), ended(process):
        everything = []
        try:
            within(START_S, lambda: last_step(folder) >= 30)
            for rank in (1, 0):
                killed, before = time.time(), len(said(log_of(folder), rank, "lost"))
                ranks_of(process)[rank].kill()
                within(GO_ON_S, lambda rank=rank, before=before: len(said(log_of(folder), rank, "lost")) > before)
                after = said(log_of(folder), rank, "lost")[-1]
                within(BACK_S, lambda rank=rank, before=before: len(said(log_of(folder), rank, "back")) > before)
                everything = psutil.Process(process.pid).children(recursive=True)
                written = [one["time"] for one in lines(folder) if one["step"] == after + 1 and "train/loss" in one]
                seconds.append(written[0] - killed)
                print(f"rank {rank} lost after step {after}: the next is recorded {seconds[-1]:.2f} s after the kill")
            within(END_S, lambda: process.poll() is not None and undisturbed.poll() is not None)
        except BaseException:
            show(process, folder)
            raise
    log = log_of(folder)
    print(log[-3000:])
    assert undisturbed.returncode == 0, log_of(plain)[-4000:]
    assert process.returncode == 0 and "Traceback" not in log
    found = difference(lines(folder), lines(plain))
    print(f"largest relative difference {found:.1e}, next steps after {seconds} s")
    assert found <= BOUND
    told = rf"^ranks? [\d, ]+ lost after step \d+: {size // 2} of {size} ranks go on"
    assert len(re.findall(told, log, re.M)) == 2
    assert not is_alive(next((folder / "runs").iterdir())) and not psutil.wait_procs(everything, timeout=10)[1]
