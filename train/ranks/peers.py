"""Recognise an error that another rank caused: it ended, so that connections to it are closed, or it does not answer.

Such an error comes from torch.distributed in the middle of a collective, on every rank that waits there. Torch is not
imported: its classes are known by their names, and gloo's errors, which are RuntimeErrors, by their texts.
"""

from __future__ import annotations

import re

CLASSES = ("DistBackendError", "DistNetworkError", "DistStoreError")
GLOO = re.compile(r"\bgloo/|connectFullMesh")
LOST = re.compile(
    r"closed by peer|reset by peer|broken pipe|connection refused|connectFullMesh|remote process exited|aborted"
    r"|ncclRemoteError|caused pair closure|failed to (recv|send)",
    re.IGNORECASE,
)
LATE = re.compile(r"timed? ?out", re.IGNORECASE)
MILLISECONDS = re.compile(r"(\d+) ?ms|Timeout\(ms\)=(\d+)")
WIDTH = 200  # characters of torch's text that are shown


def because_of_a_peer(error: BaseException) -> str:
    """What happened, as the end of a sentence that begins with `rank N`; empty if the error has another cause. Of a
    chain of errors the first counts: a pipeline raises one of its own because of it."""
    first = _first(error)
    text = str(first)
    if type(first).__name__ not in CLASSES and not (isinstance(first, RuntimeError) and GLOO.search(text)):
        return ""
    shown = _shown(text)
    if LATE.search(text):
        found = MILLISECONDS.search(text)
        limit = f"runtime.timeout_s={int(found[1] or found[2]) / 1000:g} s" if found else "runtime.timeout_s"
        return f"waited longer than {limit} for another rank, which hangs or is much slower ({shown})"
    if LOST.search(text):
        return f"lost the connection to another rank, which has ended or cannot be reached ({shown})"
    return ""


def _first(error: BaseException) -> BaseException:
    """The error that led to this one, as a traceback shows it first."""
    while before := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = before
    return error


def _shown(text: str) -> str:
    """The first line of torch's text, without the place in its source."""
    line = re.sub(r"^\[[^\]]*\] *", "", text.strip().splitlines()[0])
    return line if len(line) <= WIDTH else f"{line[:WIDTH]} ..."
