"""A signal to a run: it saves and leaves, with a documented exit code and one line, and the same line continues it."""

import signal
import time

import pytest

from tests.faults import goes_on, life_of, losses_of, newest_step, run_in

slow = pytest.mark.slow
pytestmark = pytest.mark.timeout(300)
WITHIN_S = 25  # of a signal, a run has saved and ended
APART_S = 1  # a second ctrl-C
TERM, INT, USR1, KILL = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGKILL


def signalled(run, number, *, twice=False, rank=None):
    """Send the signal while a rank is in a step. Returns how the run ended: (exit code, what was said)."""
    started = time.monotonic()
    (run.process if rank is None else run.ranks()[rank]).send_signal(number)
    if twice:
        time.sleep(APART_S)
        run.process.send_signal(number)
    else:
        run.go()
    code, said = run.end()
    assert time.monotonic() - started < WITHIN_S
    return code, said


@slow
def test_a_signal_to_the_launcher_saves(start, undisturbed, tmp_path):
    """After each, the same line continues the run, until it gets the next. Restarts are not used for this. A second INT
    does not wait for a save."""
    for number, twice in [(TERM, False), (INT, False), (USR1, False), (INT, True)]:
        run = start("waits", restarts=3)
        run.waits()
        if twice:
            assert signalled(run, INT, twice=True) == (130, "")
            continue
        code, said = signalled(run, number)
        folder = run_in(tmp_path)
        before = newest_step(folder)
        ended = f"{number.name} ended the run; the same command line continues it"
        assert (code, said) == (75, f"checkpoint saved at step {before}: {ended}\n")
        assert losses_of(folder)[-1][0] == before and life_of(folder).state == "saved"
    goes_on(start, run_in(tmp_path), undisturbed)


@slow
def test_a_run_under_bare_torchrun(start, undisturbed, tmp_path):
    """It is asked to leave by a signal to torchrun and by one to a rank; then torchrun is killed."""
    for number, rank in [(TERM, None), (INT, None), (USR1, 1)]:
        run = start("waits", restarts=None)
        run.waits()
        code, said = signalled(run, number, rank=rank)
        before = newest_step(run_in(tmp_path))
        assert said.count(f"checkpoint saved at step {before}: {number.name} ended the run; ") == 1, said
        assert code != 0 and "[rank" not in said, said
        assert rank is None or "exitcode  : 75" in said, said
    run = start("waits", restarts=None)
    run.waits()
    run.process.kill()
    assert run.end() == (-KILL, "")
    goes_on(start, run_in(tmp_path), undisturbed, restarts=None)
