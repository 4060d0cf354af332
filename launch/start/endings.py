"""How ranks end: which of them was the cause of a failure, and the one line that says so if no rank has said it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from train.command.process.exits import SIGNALS
from train.config.problems import EXIT_PEER, EXIT_SAVED

OWN_CODES = (*range(1, 10), EXIT_SAVED)  # of this program: before a rank exits with one of them, it says why
HINTS = {
    signal.SIGKILL: "somebody sent it, or the machine had no memory left, which its kernel's log would say (dmesg)",
    signal.SIGSEGV: "native code crashed; with PYTHONFAULTHANDLER=1 in the environment it prints where",
    signal.SIGBUS: "a file that it had mapped became shorter, or /dev/shm is full",
    signal.SIGABRT: "native code ended it, usually after a message of its own",
}


@dataclass(frozen=True)
class Ending:
    """How the process of a rank ended."""

    rank: int
    code: int  # as `subprocess.Popen.returncode`: -n after signal n
    stopped_s: float | None = None  # if the watch killed it: how long it had been stopped (SIGSTOP)
    timeout_s: float | None = None  # if it had been stopped for longer than runtime.timeout_s: this value

    @property
    def exit_code(self) -> int:
        """The exit code of a launcher for this ending: 128 + n after signal n, as in a shell."""
        return 128 - self.code if self.code < 0 else self.code

    @property
    def said(self) -> bool:
        """Whether the rank itself has said why it ended."""
        return self.code in OWN_CODES

    @property
    def may_be_repeated(self) -> bool:
        """Whether it makes sense to start the ranks again. A rank that left as a signal asked it to, or with a code of
        this program, has decided to end: wrong input, for example, is still wrong."""
        left = self.code in OWN_CODES or self.code - 128 in SIGNALS
        return self.code in (1, EXIT_PEER) or not left

    def __str__(self) -> str:
        if self.timeout_s is not None:
            longer = f"longer than runtime.timeout_s={self.timeout_s:g}"
            return f"rank {self.rank} was stopped (SIGSTOP) for {self.stopped_s:.0f} s, {longer}, and was killed"
        if self.stopped_s is not None:
            return f"rank {self.rank} was stopped (SIGSTOP) for {self.stopped_s:.0f} s while others waited for it"
        return f"rank {self.rank} {how_ended(self.code)}"


def how_ended(code: int) -> str:
    """`was ended by signal 9 (SIGKILL): …` or `exited with code 7`. `code`: as `subprocess.Popen.returncode`."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        number = signal.Signals(-code)
    except ValueError:  # a real-time signal, which has no name
        return f"was ended by signal {-code}"
    hint = f": {HINTS[number]}" if number in HINTS else ""
    return f"was ended by signal {-code} ({number.name}){hint}"


def cause(endings: Sequence[Ending]) -> Ending:
    """The ending that led to the others, which were seen at about the same time; the first of them if several could be.

    A rank that lost its peers exits with EXIT_PEER, NCCL aborts the process of such a rank, and torchrun ends what is
    left by TERM, so these are the cause only if there is nothing else.
    """

    def order(ending: Ending) -> int:
        followers = (-signal.SIGABRT, EXIT_PEER, -signal.SIGTERM)
        if ending.timeout_s is not None:
            return 0
        if ending.stopped_s is not None:
            return 3
        if ending.code in followers:
            return 4 + followers.index(ending.code)
        return 1 if ending.code < 0 else 2

    return min(endings, key=order)


def say(line: str) -> None:
    """Print a line about the end of the ranks. On a terminal it does not continue the line of a progress bar."""
    start = "\n" if sys.stderr.isatty() else ""
    print(f"{start}{line}", file=sys.stderr, flush=True)
