"""A sweep that is killed at any moment, and a point that is killed: the same line goes on, and nothing is lost."""

import json
import signal
from contextlib import suppress
from functools import partial

import psutil
import pytest

from tests.faults import losses_of, newest_step
from tests.started import Started
from train.checkpoint.folder import CHECKPOINTS

STEPS, EVERY = 30, 5
LINE = [
    *("-m", "launch.sweep", "strategy=dp,fsdp", "nproc=2", "runtime.device=cpu", "model.num_layers=2", "model.dim=64"),
    *("train.seq_len=32", f"train.steps={STEPS}", f"checkpoint.every={EVERY}", "train.eval_every=0"),
    *("train.eval_batches=1", "metrics.profile_every=0", "metrics.tensorboard=false"),
]


def of(sweep, pattern):
    """The paths below the folder of the runs that have been written since this start of the sweep."""
    found = []
    for path in sweep.folder.glob(f"runs/{pattern}"):
        with suppress(OSError):  # it has just been removed
            if path.stat().st_mtime > sweep.since:
                found.append(path)
    return found


MOMENTS = {
    "before its first process": lambda sweep: of(sweep, "sweep-*/points.json"),
    "when its ranks have just been started": lambda sweep: sweep.ranks(),
    "in a step": lambda sweep: of(sweep, "dp-*/metrics.jsonl"),
    "in a later save": lambda sweep: (
        of(sweep, f"dp-*/{CHECKPOINTS}/latest") and of(sweep, f"dp-*/{CHECKPOINTS}/step-*.tmp-*/*.distcp")
    ),
    "between two points": lambda sweep: of(sweep, "dp-*/summary.json"),
}


def points_of(folder):
    (path,) = folder.glob("runs/sweep-*/points.json")
    return {point["label"]: point for point in json.loads(path.read_text())["points"]}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_sweep_goes_on_wherever_it_was_killed(tmp_path):
    """After all MOMENTS, a rank of its second point is killed."""
    for moment in MOMENTS.values():
        sweep = Started(tmp_path, LINE)
        sweep.until(partial(moment, sweep))
        family = psutil.Process(sweep.process.pid).children(recursive=True)
        sweep.process.kill()
        assert not psutil.wait_procs(family, timeout=30)[1], "something trains on"
        assert sweep.end()[0] == -signal.SIGKILL
        assert points_of(tmp_path).keys() == {"dp", "fsdp"}, "its file can be read at any moment"
    saved = killed_in_second_point(Started(tmp_path, LINE))
    sweep = Started(tmp_path, LINE)
    code, said = sweep.end()
    assert (code, said) == (0, "")
    assert "[1/2] dp ... done before" in sweep.out()
    assert {point["status"] for point in points_of(tmp_path).values()} == {"done"}
    (dp,), (fsdp,) = (tmp_path.glob(f"runs/{name}-*") for name in ("dp", "fsdp"))
    curves = [[numbers["train/loss"] for _, numbers in losses_of(run) if "train/loss" in numbers] for run in (dp, fsdp)]
    assert len(curves[0]) == STEPS and curves[0] == pytest.approx(curves[1], rel=1e-4)
    for run in (dp, fsdp):
        assert [step for step, numbers in losses_of(run) if "train/loss" in numbers] == [*range(1, STEPS + 1)]
        assert newest_step(run) == STEPS and not [*run.rglob("*.tmp*")]
    for run, least in ((dp, EVERY), (fsdp, saved)):
        assert json.loads((run / "summary.json").read_text())["continued_after_step"] >= least


def killed_in_second_point(sweep):
    """Kill a rank of it when it has saved. The sweep ends in order. Returns the step that was saved."""
    sweep.until(lambda: of(sweep, f"fsdp-*/{CHECKPOINTS}/latest"))
    sweep.ranks()[1].kill()
    code, said = sweep.end()
    assert (code, said) == (1, ""), said
    assert points_of(sweep.folder)["fsdp"]["exit_code"] == 128 + signal.SIGKILL
    assert "rank 1 was ended by signal 9" in sweep.out()
    (run,) = sweep.folder.glob("runs/fsdp-*")
    assert not (run / "summary.json").exists(), "it was killed too late"
    return newest_step(run)
