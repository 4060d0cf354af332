"""The roll's server: a thread of the keeper of place 0, with one connection for each rank. Torch is not imported."""

from __future__ import annotations

import selectors
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass

from train.ranks.elastic.messages import Done, Failed, Message, Ready, decoded, encoded
from train.ranks.elastic.roll import Mail, Roll

MOST_BYTES = 2**16  # of a line; a start names every place
SEND_S = 5.0  # a rank that does not take a message within this time gets none
# The kernel closes the connections of a process that ends. Only if a whole machine is gone, nobody does; so a silent
# connection is probed, after 5 s, three times (the names are Linux's).
PROBES = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3}


@dataclass(eq=False)
class _Line:
    """The connection of a rank. `place`: None until its first message."""

    socket: socket.socket
    place: int | None = None
    unread: bytes = b""


class RollServer:
    """Listens on `host` at a free port; `address` is HOST:PORT. The thread ends with the process."""

    def __init__(self, roll: Roll, host: str) -> None:
        self.roll = roll
        self.listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.address = f"{host}:{self.listener.getsockname()[1]}"
        self.lines: list[_Line] = []
        self.changed = threading.Condition()
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ)
        threading.Thread(target=self._serve, daemon=True).start()

    def wait_until_empty(self) -> None:
        """Return when no rank is connected any more."""
        with self.changed:
            self.changed.wait_for(lambda: not self.lines)

    def _serve(self) -> None:
        while True:
            for key, _ in self.selector.select():
                if key.data is None:
                    self._accept()
                elif key.data in self.lines:  # it may have been closed since
                    self._read(key.data)

    def _accept(self) -> None:
        connection, _ = self.listener.accept()
        connection.settimeout(SEND_S)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in PROBES.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        line = _Line(connection)
        self.lines.append(line)
        self.selector.register(connection, selectors.EVENT_READ, line)

    def _read(self, line: _Line) -> None:
        try:
            received = line.socket.recv(MOST_BYTES)
        except OSError:
            received = b""
        *whole, line.unread = (line.unread + received).split(b"\n")
        try:
            messages = [decoded(text) for text in whole]
        except ValueError:  # it is no rank
            messages, received = [], b""
        for message in messages:
            self._send(self._take(line, message))
        if not received or len(line.unread) > MOST_BYTES:
            self._close(line)

    def _take(self, line: _Line, message: Message) -> Mail:
        if isinstance(message, Done):
            return self.roll.is_done(message.place)
        if isinstance(message, Failed):
            return self.roll.has_failed(message.place)
        if not isinstance(message, Ready) or message.place not in range(self.roll.num_places):
            return []
        for older in [one for one in self.lines if one.place == message.place and one is not line]:
            self._close(older)  # its process has ended, as the keeper has started this one
        line.place = message.place
        return self.roll.is_ready(message.place, message.step)

    def _send(self, mail: Mail) -> None:
        by_place = {line.place: line for line in self.lines}
        for place, message in mail:
            if (line := by_place.get(place)) is not None:
                with suppress(OSError):  # its end will be read
                    line.socket.sendall(encoded(message))

    def _close(self, line: _Line) -> None:
        self.selector.unregister(line.socket)
        line.socket.close()
        with self.changed:
            self.lines.remove(line)
            self.changed.notify_all()
        if line.place is not None:
            self._send(self.roll.has_ended(line.place))
