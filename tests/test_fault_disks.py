"""A disk that is full, read-only or removed, and a text that is lost: one line says so, and the same line goes on."""

import shutil

import pytest

from tests.faults import EVERY, TEXT, goes_on, is_saved, newest_step, run_in

slow = pytest.mark.slow
pytestmark = pytest.mark.timeout(300)
FULL, READ_ONLY, GONE = "No space left on device", "Read-only file system", "No such file or directory"


@slow
def test_a_disk_that_fails(start, disk, undisturbed):
    """The run's directory is removed, and a new run begins; then the disk is full at a save, read-only at one, and full
    at a log. After each, the same line goes on."""
    run, folder = waiting(start, disk)
    shutil.rmtree(folder)
    is_one_line(run, GONE)

    run, folder = waiting(start, disk)
    disk.fill(but_kib=500)
    is_one_line(run, FULL)
    is_saved(folder)
    disk.make_room()

    run, again = waiting(start, disk)
    disk.read_only()
    is_one_line(run, READ_ONLY)
    is_saved(folder)
    disk.writable()

    run, again = waiting(start, disk)
    disk.fill()
    is_one_line(run, FULL)
    assert again == folder and newest_step(folder) >= 3 * EVERY, "each start went on"
    disk.make_room()
    goes_on(start, folder, undisturbed, prefix=disk.prefix)


def waiting(start, disk):
    """A start that waits in a step, and the run's folder on the disk."""
    run = start("waits", prefix=disk.prefix, restarts=2)
    run.waits()
    (folder,) = disk.runs.iterdir()
    return run, folder


def is_one_line(run, why):
    """The start ends when it goes on, and says why."""
    run.go()
    code, said = run.end()
    assert code == 3 and "Traceback" not in said and said.count("\n") == 2, said
    assert f"({why})" in said or f": {why}; " in said, said
    assert said.endswith("\npython -m launch.doctor checks this machine\n")


@slow
def test_a_disk_that_cannot_be_used_is_refused_at_the_start(start, disk):
    """It has no room for the checkpoints; it is read-only."""
    disk.fill(but_kib=3 * 2**10)
    code, said = start(prefix=disk.prefix).end()
    assert code == 3 and "3 checkpoints of" in said and "checkpoint.every=0 to save none" in said
    disk.read_only()
    code, said = start(prefix=disk.prefix).end()
    assert code == 3 and f"metrics.dir=runs cannot be written ({READ_ONLY})" in said, said
    assert [path.name for path in disk.runs.iterdir()] == ["full"], "nothing was started"


@slow
def test_the_text_is_lost_during_the_run(start, undisturbed, tmp_path):
    """It is removed; after it was put back, it becomes shorter. It was memory-mapped once: SIGBUS ended all ranks
    without a word."""
    text = tmp_path / "text.txt"
    for lose, why in (text.unlink, GONE), (lambda: text.write_text(TEXT[:1000]), "it became shorter"):
        run = start("waits", restarts=2)  # it puts the text back
        run.waits()
        lose()
        run.go()
        code, said = run.end()
        lost = f"text.txt cannot be read any more ({why}): put it back as it was; "
        lost += "the same command line continues the run from"
        assert code == 3 and said.count("\n") == 2 and said.removeprefix("rank 1: ").startswith(lost), said
    goes_on(start, run_in(tmp_path), undisturbed)
