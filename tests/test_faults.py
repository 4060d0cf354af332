"""However a run is cut off, nothing is lost: the same line continues it, as if it had not been cut off.

After each fault there is a complete, verified checkpoint, no older than `checkpoint.every` steps; the exit code and one
line say the reason, without a traceback of a rank that is not the cause; after the resume each step is once in
metrics.jsonl and in TensorBoard, with the loss of the undisturbed run to the last bit, so that no sample was seen twice
or skipped; and no process, temporary file, shared memory or unfinished checkpoint is left.
"""

import re
import signal

import pytest

from tests.faults import (
    EVERY,
    is_saved,
    is_whole,
    life_of,
    losses_of,
    run_in,
)
from train.checkpoint.folder import complete, step_of

slow = pytest.mark.slow
pytestmark = pytest.mark.timeout(300)
KILL, STOP = signal.SIGKILL, signal.SIGSTOP
AT_A_SAVE = {  # what is killed, and which rank that is
    "killed_while_writing": 1,
    "killed_before_the_manifest": 0,
    "killed_before_the_name": 0,
    "killed_before_latest": 0,
}
BEFORE_ITS_NAME = ("killed_while_writing", "killed_before_the_name")  # the rest of a save is the same in both modes


def restarted(run, number, most=EVERY):
    """Wait until the launcher has said for the `number`th time that it starts the ranks again, and look what is left
    before they have come so far."""
    run.until(lambda: f"(restart {number} of " in run.said())
    is_saved(run_in(run.folder), most)


@slow
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_ranks_that_are_killed_at_a_moment_of_a_save(mode, start, undisturbed, tmp_path):
    """One run survives all of them. The first save is not disturbed: there must be something to go on from."""
    killed = AT_A_SAVE if mode == "sync" else {name: AT_A_SAVE[name] for name in BEFORE_ITS_NAME}
    count = len(killed)
    run = start(",".join(killed), f"checkpoint.mode={mode}", restarts=count)
    for number in range(1, count + 1):
        restarted(run, number, EVERY if mode == "sync" else 2 * EVERY)  # a save may be going on during the next steps
    code, said = run.end()
    assert code == 0, said
    lines = said.splitlines()
    for number, rank in enumerate(killed.values(), start=1):
        line = rf"rank {rank} was ended by signal 9 .*; all ranks are started again \(restart {number} of {count}\)"
        assert re.fullmatch(line, lines[number - 1]), said
    assert len(lines) == count, said
    assert sorted(path.name for path in run.faults.iterdir()) == sorted(killed)
    is_whole(run_in(tmp_path), undisturbed)


@slow
def test_processes_that_raise_or_are_killed_or_stopped(start, undisturbed, tmp_path):
    """One run survives an error of rank 1, which is the only one with a traceback, a kill of rank 1, of rank 0 and of
    torchrun, and a rank that is stopped."""
    run = start("raises,waits", "runtime.timeout_s=10", restarts=5)
    again = r"are started again \(restart {} of 5\)"
    faults = [
        (1, KILL, r"rank 1 was ended by signal 9 .*; all ranks "),
        (0, KILL, r"rank 0 was ended by signal 9 .*; all ranks "),
        ("agent", KILL, r"torchrun's process was ended by signal 9 .*; it and all ranks "),
        (1, STOP, r"rank 1 was stopped \(SIGSTOP\) for \d+ s, .* runtime.timeout_s=10, and was killed; all ranks "),
    ]  # fmt: skip
    run.waits()
    run.go()
    restarted(run, 1)
    run.stays()
    for number, (victim, fault, _) in enumerate(faults, start=2):
        run.waits(number)
        (run.agent() if victim == "agent" else run.ranks()[victim]).send_signal(fault)
        restarted(run, number)
    run.go()
    code, said = run.end()
    assert code == 0, said
    traceback, ended, line = said.partition("\nrank 1 exited with code 1; all ranks ")
    assert traceback.startswith("[rank1]: Traceback") and traceback.endswith("\n[rank1]: RuntimeError: a planted error")
    assert traceback.count("Traceback") == 1 and "[rank0]" not in said, said
    first, *lines = (ended + line).strip().splitlines()
    assert re.fullmatch(r"rank 1 exited with code 1; all ranks " + again.format(1), first) and len(lines) == len(faults)
    for number, ((_, _, line), found) in enumerate(zip(faults, lines, strict=True), start=2):
        assert re.fullmatch(line + again.format(number), found), said
    is_whole(run_in(tmp_path), undisturbed)


@slow
def test_not_finite_on_one_rank_stops_all_and_is_never_saved(start, tmp_path):
    code, said = start("not_finite", restarts=2).end()
    run = run_in(tmp_path)
    assert code == 6 and re.fullmatch(r"step 5: train/loss=nan, .*: use a lower optim.lr, .*\n", said), said
    assert [step_of(path) for path in complete(run)] == [EVERY], "the state of step 5 is not finite"
    assert life_of(run).state == "stopped" and "train/loss=nan" in life_of(run).reason
    again = start()
    again.until(lambda: len([*(tmp_path / "runs").iterdir()]) == 2)
    assert "continuing" not in again.out(), "a run that was stopped is not continued"


@slow
def test_skip_makes_no_update(start, tmp_path):
    code, said = start("not_finite", "train.on_nonfinite=skip", "train.steps=8").end()
    assert (code, said) == (0, "")
    losses = [numbers.get("train/loss") for _, numbers in losses_of(run_in(tmp_path))]
    assert losses[4] is None and all(loss is not None for loss in losses[5:8])


@slow
def test_ignore_goes_on_but_saves_no_bad_state(start, tmp_path):
    words = ("train.on_nonfinite=ignore", "optim.lr=1e30", "optim.warmup_steps=0", "train.steps=4")
    code, said = start("none", *words).end()
    run = run_in(tmp_path)
    assert code == 0 and life_of(run).state == "finished"
    why = "its state has numbers that are not finite, on ranks [0, 1]; there is no older one"
    assert said == f"the checkpoint of step 4 was not saved: {why}\n"
    assert complete(run) == []


@slow
def test_ranks_that_disagree_are_refused(start, tmp_path):
    code, said = start("other_config", restarts=2).end()
    assert code == 2 and "Traceback" not in said
    assert said.count("ranks have different values of optim.lr: 0.001 on ranks 0; 0.5 on ranks 1") == 1, said
    assert [*(tmp_path / "runs").iterdir()] == [], "nothing was started"


@slow
def test_two_identical_runs_at_once(start, tmp_path):
    """One of them trains, and the other is refused with the first one's process."""
    both = [start("waits"), start("waits")]
    both[0].until(lambda: None in (run.process.poll() for run in both) and any(run.said() for run in both))
    for run in both:
        run.go()
    ends = [run.end() for run in both]
    assert sorted(code for code, _ in ends) == [0, 3], ends
    ((_, refused),) = (end for end in ends if end[0])
    assert "is being trained by process" in refused and "checkpoint.resume=never" in refused
    is_saved(run_in(tmp_path))
