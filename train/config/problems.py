"""Problems of a run and how they are reported: once, with the value, the rule and the fix."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

EXIT_INPUT = 2  # the command line or the data is wrong
EXIT_ENVIRONMENT = 3  # the machine cannot do what they ask for
EXIT_PEER = 5  # another rank ended or did not answer; 4 is of scripts/verify.py
EXIT_STOPPED = 6  # training was stopped by an error of its own, which would come again
EXIT_SAVED = 75  # a signal ended the run after it had saved a checkpoint: sysexits.h calls it "try again later"


@dataclass(frozen=True)
class Problem:
    rule: str  # the broken rule's name
    message: str  # the value and the rule
    fix: str  # what to do instead
    overrides: tuple[str, ...] = ()  # overrides that fix everything, if any were found
    exit_code: int = EXIT_INPUT

    def __str__(self) -> str:
        return f"{self.message}: {self.fix}"


def problem_lines(problems: Sequence[Problem]) -> list[str]:
    """A line for each problem. Successive problems with the same fix share one line with that fix, which follows
    them."""
    lines = []
    for fix, group in itertools.groupby(problems, key=lambda problem: problem.fix):
        together = [*group]
        if len(together) == 1:
            lines.append(str(together[0]))
        else:
            lines += [*(problem.message for problem in together), f"for these {len(together)} together: {fix}"]
    return lines


def unusable(folder: object, why: str | None) -> BadInput:
    """The error for a metrics.dir that cannot be written. `why`: an OSError's `strerror`."""
    message = f"metrics.dir={folder} cannot be written ({why})"
    return BadInput(
        Problem(
            "metrics_dir",
            message,
            "use metrics.dir=FOLDER with a folder that can be written",
            exit_code=EXIT_ENVIRONMENT,
        )
    )


OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)


@contextmanager
def writable(folder: object) -> Iterator[None]:
    """The context in which an OSError of a file or of a disk is an error for metrics.dir=`folder`."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno not in OF_DISKS:
            raise
        raise unusable(folder, error.strerror) from error


class Reported(Exception):
    """An error that ends the run with one message: no traceback, and not one message per rank."""

    exit_code = 1
    cut_off = False  # whether the same command goes on from the last checkpoint; else it would fail again
    of_one_rank = False  # whether one rank may have it alone; usually rank 0 has it too, and reports it

    def report(self) -> str:
        return str(self)


class NonFinite(Reported):
    """The loss or the gradient norm is NaN or infinite."""

    exit_code = EXIT_STOPPED


class Unwritable(Reported):
    """The disk fails during a run. `fix`: what continues the run then."""

    exit_code = EXIT_ENVIRONMENT
    cut_off = True
    of_one_rank = True

    def __init__(self, run: object, why: str | None, fix: str) -> None:
        super().__init__(f"{run} cannot be written any more ({why}): {fix}")


class BadInput(Reported):
    """Problems that a user can fix before anything is trained."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems
        self.exit_code = min(problem.exit_code for problem in problems)

    def report(self) -> str:
        count = len(self.problems)
        head = "1 problem, nothing was trained:" if count == 1 else f"{count} problems, nothing was trained:"
        return "\n".join([head, *(f"  {line}" for line in problem_lines(self.problems))])
