"""Whether a process is stopped (SIGSTOP), so that others wait for it in vain. Torch is not imported."""

from __future__ import annotations

from contextlib import suppress

import psutil

PAUSE_S = 5.0  # if this much time passes between two looks, the looking process was stopped too: clocks start anew


def is_stopped(pid: int) -> bool:
    """Whether the process is stopped by a signal. One that a debugger has stopped is not meant."""
    with suppress(psutil.Error):
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    return False
