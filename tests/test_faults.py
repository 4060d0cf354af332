"""However a run is cut off, nothing is lost: the same line continues it, as if it had not been cut off.

After each fault there is a complete, verified checkpoint, no older than `checkpoint.every` steps; the exit code and one
line say the reason; after the resume each step is once in metrics.jsonl and in TensorBoard, with the loss of the
undisturbed run to the last bit; and nothing unfinished is left.
"""

import os
import shutil
import signal
import time

import psutil
import pytest

from tests.faults import (
    EVERY,
    LINE,
    PATIENCE_S,
    in_small_tmpfs,
    life_of,
    losses_of,
    nothing_is_lost,
    ranks_of,
    reaches,
    run_in,
)
from train.checkpoint.checkpoints import state_bytes
from train.checkpoint.folder import complete, step_of
from train.command import cli
from train.model.transformer import Transformer, dtypes

KILLED = ["killed_while_writing", "killed_before_the_manifest", "killed_before_the_name", "killed_before_latest"]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("fault", KILLED)
def test_killed_at_a_moment_of_a_save(fault, start, undisturbed, tmp_path):
    """The first save is not disturbed, the later ones are: there must be something to go on from."""
    first = start("slow")
    run = reaches(first, tmp_path, EVERY)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    (tmp_path / "marker").rmdir()
    process = start(fault)
    process.wait(PATIENCE_S)
    assert (tmp_path / "marker").exists(), "the fault did not happen"
    assert process.returncode != 0
    nothing_is_lost(run, process, start, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_rank(rank, start, undisturbed, tmp_path):
    process = start("slow")
    run = reaches(process, tmp_path, EVERY)
    ranks_of(process)[rank].kill()
    nothing_is_lost(run, process, start, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_torchrun(start, undisturbed, tmp_path):
    process = start("slow")
    run = reaches(process, tmp_path, EVERY)
    ranks = ranks_of(process)
    process.kill()
    assert not psutil.wait_procs(ranks, timeout=30)[1], "something trains on"
    nothing_is_lost(run, process, start, undisturbed)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_signal_to_torchrun_saves(number, start, undisturbed, tmp_path):
    process = start("slow")
    run = reaches(process, tmp_path, EVERY)
    process.send_signal(number)
    started = time.monotonic()
    out, errors = nothing_is_lost(run, process, start, undisturbed)
    assert errors.count("checkpoint saved at step ") == 1, errors
    assert f"{number.name} ended the run; the same command line continues it" in errors
    assert time.monotonic() - started < PATIENCE_S
    assert f"continuing {run.relative_to(tmp_path)} after step" not in out


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_usr1_to_one_rank_saves_on_all(start, undisturbed, tmp_path):
    process = start("slow")
    run = reaches(process, tmp_path, EVERY)
    ranks_of(process)[1].send_signal(signal.SIGUSR1)
    _, errors = nothing_is_lost(run, process, start, undisturbed)
    assert errors.count("checkpoint saved at step ") == 1 and "SIGUSR1 ended the run" in errors
    assert "exitcode  : 75" in errors or "exitcode: 75" in errors.replace(" ", "")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_rank_that_raises_has_its_traceback_once(start, undisturbed, tmp_path):
    process = start("raises_on_one_rank")
    process.wait(PATIENCE_S)
    run = run_in(tmp_path)
    _, errors = nothing_is_lost(run, process, start, undisturbed)
    assert errors.count("RuntimeError: a planted error") == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_not_finite_on_one_rank_stops_all_and_is_never_saved(start, undisturbed, tmp_path):
    process = start("not_finite_on_one_rank")
    _, errors = process.communicate(timeout=PATIENCE_S)
    run = run_in(tmp_path)
    assert process.returncode == 1 and "train/loss=nan" in errors
    assert [step_of(path) for path in complete(run)] == [EVERY], "the state of step 5 is not finite"
    assert life_of(run).state == "stopped" and "train/loss=nan" in life_of(run).reason
    again = start()
    again.communicate(timeout=PATIENCE_S)
    assert len([*(tmp_path / "runs").iterdir()]) == 2, "a run that was stopped is not continued"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_skip_makes_no_update(start, tmp_path):
    process = start("not_finite_on_one_rank", "train.on_nonfinite=skip", "train.steps=8")
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, errors
    losses = [line.get("train/loss") for _, line in losses_of(run_in(tmp_path))]
    assert losses[4] is None and all(loss is not None for loss in losses[5:8])


@pytest.mark.timeout(200)
def test_ranks_that_disagree_are_refused(start, tmp_path):
    process = start("other_config_on_one_rank")
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert errors.count("ranks have different values of optim.lr: 0.001 on ranks 0; 0.5 on ranks 1") == 1, errors
    assert not (tmp_path / "runs").exists(), "nothing was started"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_identical_runs_at_once(start, tmp_path):
    """One of them trains, and the other is refused with the first one's process."""
    both = [start(), start()]
    ends = [process.communicate(timeout=2 * PATIENCE_S)[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 1], ends
    refused = ends[codes.index(1)]
    assert "is being trained by process" in refused and "checkpoint.resume=never" in refused
    assert len([*(tmp_path / "runs").iterdir()]) == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_text_has_changed_between_runs(start, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("some words of a text " * 2000)
    words = ("data=text", f"data.path={text}")
    process = start("none", *words)
    reaches(process, tmp_path, EVERY)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    text.write_text("other words of a text " * 2000)
    again = start("none", *words)
    _, errors = again.communicate(timeout=PATIENCE_S)
    assert "data.corpus_sha256=" in errors and "train on the same text, or start a new run" in errors


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_full_disk_at_a_save(tmp_path):
    """There is room for two checkpoints, but not for a third before the first is removed."""
    config = cli.configured(LINE)
    model = Transformer(config.model, **dtypes(config.precision))
    size = state_bytes(config, sum(p.numel() for p in model.parameters()))
    assert size > 1.5 * 2**20, "room for the other files of the run"
    result = in_small_tmpfs(tmp_path, int(2.7 * size / 2**10))
    assert "was not saved: rank" in result.stderr and ": No space left on device; " in result.stderr, result.stderr
    assert "the newest good one is runs/" in result.stderr
    assert "step-4:" in result.stdout and "step-8:" in result.stdout and ".tmp" not in result.stdout
    assert "[rank0]: Traceback" not in result.stderr and "Exception in thread" not in result.stderr


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_full_disk_at_a_log(tmp_path):
    result = in_small_tmpfs(tmp_path, 400, "checkpoint.every=0", "train.steps=2000")
    assert "cannot be written any more (No space left on device)" in result.stderr, result.stderr
    assert "[rank0]: Traceback" not in result.stderr and "Exception in thread" not in result.stderr


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_no_room_for_two_is_refused_at_the_start(tmp_path):
    result = in_small_tmpfs(tmp_path, 1000)
    assert "two checkpoints need" in result.stderr and "checkpoint.every=0 to save none" in result.stderr


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_removed_run_directory(start, tmp_path):
    process = start("slow")
    run = reaches(process, tmp_path, EVERY)
    shutil.rmtree(run)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1 and "(No such file or directory)" in errors
