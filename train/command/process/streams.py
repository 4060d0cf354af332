"""Standard output and error that do not fail when nobody reads them: `… | head -1`, a closed terminal, a full disk.

A run that cannot print continues, and a tool whose output is no longer read ends with its own exit code, not with a
traceback.
"""

from __future__ import annotations

import io
import os
import sys
from typing import TextIO


class _Lasting(io.TextIOWrapper):
    """Once a write has failed, its file descriptor is redirected to /dev/null."""

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
        if not isinstance(error, BlockingIOError):  # the reader is only slow
            _to_nowhere(self.fileno())


def lasting() -> None:
    """Replace the standard streams; call it first in a program. A character that the stream's encoding does not have is
    written as its code."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # it was closed by the parent, and the next file to be opened would get its number
            _to_nowhere(descriptor)
    sys.stdout, sys.stderr = _wrapped(sys.stdout, 1), _wrapped(sys.stderr, 2)


def _wrapped(stream: TextIO | None, descriptor: int) -> TextIO:
    if not isinstance(stream, io.TextIOWrapper):  # None if the descriptor was closed when Python started
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
