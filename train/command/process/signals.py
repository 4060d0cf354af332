"""Signals that ask a run to save and to leave: TERM, INT, USR1, and HUP (a closed terminal). Torch is not imported.

A rank only notes the signal: all ranks agree after a step, because they must save the same step together. A second INT
(ctrl-C) ends the process at once.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

from train.config.problems import EXIT_PEER
from train.ranks.peers import because_of_a_peer

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
APART_S = 0.5  # a terminal and torchrun both pass on the same ctrl-C; a second one comes later than this


class Signals:
    """The context in which the signals are noted. `number`: that of the first one; 0 if there was none.

    After an error the signals end the process again as usual. One that was noted before another rank's end was noticed
    ends it now: once a collective has failed, nobody can save.
    """

    def __init__(self) -> None:
        self.number = 0
        self.since = 0.0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        wanted = [one for one in SIGNALS if signal.getsignal(one) is not signal.SIG_IGN]  # as HUP under nohup
        self.before = {one: signal.signal(one, self._note) for one in wanted}
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        for one, handler in self.before.items():
            signal.signal(one, handler)
        if self.number and error is not None and because_of_a_peer(error):
            # torchrun asked this rank to end, as another one had ended, before this rank noticed: nobody waits for it
            os._exit(EXIT_PEER)

    def ignore(self) -> None:
        """Ignore the signals from now on, as the process is about to end."""
        for one in self.before:
            signal.signal(one, signal.SIG_IGN)
        self.before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self.since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() > self.since + APART_S:
            os._exit(128 + number)
