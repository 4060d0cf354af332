"""A disk that is full, read-only or removed, and a text that is lost: one line says so, and the same line goes on."""

import shutil

import pytest

from tests.faults import TEXT, goes_on, is_saved, run_in

slow = pytest.mark.slow
pytestmark = pytest.mark.timeout(300)
FULL, READ_ONLY, GONE = "No space left on device", "Read-only file system", "No such file or directory"


@slow
@pytest.mark.parametrize(
    ("fault", "why"), [("full", FULL), ("read_only", READ_ONLY), ("full at a log", FULL), ("removed", GONE)]
)
def test_a_disk_that_fails(fault, why, start, disk, undisturbed, tmp_path):
    """It is full or read-only at a save, full at a log, or the run's directory is removed."""
    run = start("waits", prefix=disk.prefix, restarts=2)
    run.waits()
    (folder,) = disk.runs.iterdir()
    if fault == "removed":
        shutil.rmtree(folder)
    elif fault == "read_only":
        disk.read_only()
    else:
        disk.fill(but_kib=0 if fault == "full at a log" else 500)
    run.go()
    code, said = run.end()
    assert code == 3 and "Traceback" not in said and said.count("\n") == 2, said
    assert f"({why})" in said or f": {why}; " in said, said
    assert said.endswith("\npython -m launch.doctor checks this machine\n")
    if fault == "removed":
        return
    is_saved(folder)
    if fault == "read_only":
        disk.writable()
    else:
        disk.make_room()
    goes_on(start, folder, undisturbed, prefix=disk.prefix)


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
@pytest.mark.parametrize("how", ["shortened", "removed"])
def test_the_text_is_lost_during_the_run(how, start, undisturbed, tmp_path):
    """It was memory-mapped once: SIGBUS ended all ranks without a word."""
    run, text = start("waits", restarts=2), tmp_path / "text.txt"
    run.waits()
    if how == "removed":
        text.unlink()
    else:
        text.write_text(TEXT[:1000])
    run.go()
    code, said = run.end()
    why = GONE if how == "removed" else "it became shorter"
    lost = (
        f"text.txt cannot be read any more ({why}): put it back as it was; the same command line continues the run from"
    )
    assert code == 3 and said.count("\n") == 2 and said.removeprefix("rank 1: ").startswith(lost), said
    goes_on(start, run_in(tmp_path), undisturbed)
