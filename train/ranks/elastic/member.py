"""A rank's line to the roll: it says when the rank is ready, and hears when its generation is over. Torch is not
imported."""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from train.config.problems import EXIT_PEER, Reported
from train.ranks.elastic.messages import Done, Failed, Finished, Message, Over, Ready, Start, Waiting, decoded, encoded

AGAIN_S = 0.05  # connections that are opened while a generation ends are shut down too, after this time
CONNECT_S = 30.0


class RollLost(Reported):
    """The keeper of place 0, which keeps the roll, has ended. torchrun then ends the other places too."""

    exit_code = EXIT_PEER
    cut_off = True

    def __init__(self) -> None:
        super().__init__("the keeper of rank 0 has ended or cannot be reached")


class Member:
    """`address`: HOST:PORT of the roll. `interrupt`: ends what the main thread waits for; it is called, in a thread,
    from the end of a generation until the main thread asks for the next one. If this does not happen within
    `patience_s`, the process is killed, as the others wait for it."""

    def __init__(self, place: int, address: str, interrupt: Callable[[], None], patience_s: float) -> None:
        self.place, self.interrupt, self.patience_s = place, interrupt, patience_s
        host, _, port = address.rpartition(":")
        try:
            self.socket = socket.create_connection((host, int(port)), CONNECT_S)
        except OSError as error:
            raise RollLost from error
        self.socket.settimeout(None)
        self.waiting: list[int] = []  # places that wait until the generation lets them in
        self.lost: list[int] = []  # places that have ended in this generation
        self.over, self.seen = threading.Event(), threading.Event()
        self.failed = False  # whether a rank has an error that ends the run
        self.starts: queue.Queue[Start | Finished | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def next_start(self, step: int | None) -> Start | None:
        """Say that this rank is ready, with the last step that it has made, and wait for the next generation. None: the
        run is complete. Raises RollLost."""
        self.seen.set()
        try:
            self.socket.sendall(encoded(Ready(self.place, step)))
        except OSError as error:
            raise RollLost from error
        start = self.starts.get()
        if start is None:
            raise RollLost
        return start if isinstance(start, Start) else None

    def is_over(self, patience_s: float) -> bool:
        """Whether the generation is over, and others may follow. What this rank has noticed itself may reach the roll a
        little later."""
        return self.over.wait(patience_s) and not self.failed

    @contextmanager
    def hurried(self, patience_s: float) -> Iterator[None]:
        """Within this context the main thread may wait for what cannot be interrupted, but not longer than this."""
        before, self.patience_s = self.patience_s, patience_s
        try:
            yield
        finally:
            self.patience_s = before

    def done(self) -> None:
        """Say that this rank has trained and written the last step."""
        with suppress(OSError):
            self.socket.sendall(encoded(Done(self.place)))

    def fail(self) -> None:
        """Say that this rank has an error of its own, which ends the run."""
        self.failed = True
        with suppress(OSError):
            self.socket.sendall(encoded(Failed(self.place)))

    def close(self) -> None:
        """End the connection: for the roll, this rank has ended."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # the thread still reads from it
        self.socket.close()

    def _listen(self) -> None:
        with suppress(OSError), self.socket.makefile("rb") as lines:
            for line in lines:
                self._take(decoded(line))
        self.starts.put(None)

    def _take(self, message: Message) -> None:
        if isinstance(message, Start):
            self.waiting, self.lost = [], []
            self.over.clear()
            self.seen.clear()
            self.starts.put(message)
        elif isinstance(message, Finished):
            self.starts.put(message)
        elif isinstance(message, Waiting):
            self.waiting = message.places
        elif isinstance(message, Failed):
            self.failed = True
            self.over.set()
        elif isinstance(message, Over):
            self.lost = message.lost
            self.over.set()
            since = time.monotonic()
            while not self.seen.is_set():
                self.interrupt()
                patience_s = self.patience_s
                if time.monotonic() > since + patience_s and not self.failed:  # else this process is about to end
                    say = f"rank {self.place} could not be interrupted for {patience_s:g} s and is killed"
                    print(say, file=sys.stderr, flush=True)
                    os.kill(os.getpid(), signal.SIGKILL)
                self.seen.wait(AGAIN_S)
