"""Standard output and error that outlast their readers: `… | head -1`, a terminal that is gone, a full disk.

A run that cannot say something goes on, and a tool that nobody reads any more ends with its own exit code, not with a
traceback.
"""

from __future__ import annotations

import io
import os
import sys
from typing import TextIO


class _Lasting(io.TextIOWrapper):
    """Writes to nowhere, by its file descriptor, once writing has failed."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._failed(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        if not isinstance(error, BlockingIOError):  # that reader is only slow
            _to_nowhere(self.fileno())


def lasting() -> None:
    """Call first thing in a program. A character that the stream's encoding does not have is written as its code."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed by who started this: the next file that is opened would be taken for it
            _to_nowhere(descriptor)
    sys.stdout, sys.stderr = _wrapped(sys.stdout, 1), _wrapped(sys.stderr, 2)


def _wrapped(stream: TextIO | None, descriptor: int) -> TextIO:
    if not isinstance(stream, io.TextIOWrapper):  # None: Python found the descriptor closed
        return _Lasting(open(descriptor, "wb"), encoding="utf-8", line_buffering=True)
    return _Lasting(
        stream.buffer,
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _to_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere == descriptor:
        os.set_inheritable(descriptor, True)
    else:
        os.dup2(nowhere, descriptor)
        os.close(nowhere)
