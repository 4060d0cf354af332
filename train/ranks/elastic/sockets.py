"""The connections of a generation, and how they are closed from outside. Torch is not imported.

gloo cannot be aborted (torch 2.11 to 2.13: `abort` and `shutdown` of its process group do nothing), so a rank that
waits in a collective would wait until its time-out. But each of its waits ends with an error as soon as a connection is
shut down, which another thread can do. Listening sockets are left alone, because gloo ends the process if one fails.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import suppress

OPEN = "/dev/fd"  # a folder with an entry for each open descriptor of this process


class Connections:
    """The sockets that are opened after this object is made, until `complete` is called."""

    def __init__(self) -> None:
        self.before = {number for _, number in _sockets()}
        self.own: set[int] | None = None

    def complete(self) -> None:
        """Sockets that are opened from now on do not belong to the generation."""
        self.own = {number for _, number in _sockets()} - self.before

    def shut_down(self) -> None:
        """Shut down every connection of the generation: what waits for one of them, here or at its other end, gets an
        error."""
        for descriptor, number in list(_sockets()):
            if number not in self.before if self.own is None else number in self.own:
                with suppress(OSError):  # it was closed meanwhile
                    _shut_down(descriptor, number)


def _sockets() -> Iterator[tuple[int, int]]:
    """Every open socket of this process: its descriptor, and a number that is never used again."""
    for name in os.listdir(OPEN):
        with suppress(OSError):  # the descriptor of the listing itself
            status = os.stat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                yield int(name), status.st_ino


def _shut_down(descriptor: int, number: int) -> None:
    with socket.socket(fileno=os.dup(descriptor)) as copy:
        same = os.stat(copy.fileno()).st_ino == number  # and not another one that got its descriptor
        network = copy.family in (socket.AF_INET, socket.AF_INET6)  # and not one of a device's driver
        if same and network and not copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            copy.shutdown(socket.SHUT_RDWR)
