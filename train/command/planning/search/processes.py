"""Worker processes that each hold a copy of one object and call its methods for the items that they get."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

from train.config.problems import EXIT_ENVIRONMENT, BadInput, Problem

ENDED = Problem(
    "process",
    "a process of the search was ended from outside, perhaps by the system, because memory was short",
    "free some memory, and start it again",
    exit_code=EXIT_ENVIRONMENT,
)


class Processes:
    """`held`: the object, with what it knows already. With one worker there is no process: the object itself is asked.

    It is a context, which ends the processes. They are forked, so use it before the program starts threads.
    """

    def __init__(self, held: object, workers: int) -> None:
        self.held, self.workers = held, workers
        self.pipes: list[Connection] = []

    def __enter__(self) -> Processes:
        if self.workers == 1:
            return self
        context = get_context("fork")
        for _ in range(self.workers):
            own, theirs = context.Pipe()
            context.Process(target=_serve, args=(self.held, theirs), daemon=True).start()
            theirs.close()  # so that `recv` ends if the process ends
            self.pipes.append(own)
        return self

    def __exit__(self, *error: object) -> None:
        for pipe in self.pipes:
            pipe.close()  # which ends the process

    def run(self, method: str, items: Iterator[Any]) -> Iterator[Any]:
        """The results, in the order in which they are ready. An item is taken when a process is free for it."""
        if self.workers == 1:
            yield from map(getattr(self.held, method), items)
            return
        busy: set[Connection] = set()
        for pipe in self.pipes:
            self._next(pipe, method, items, busy)
        while busy:
            for ready in wait([*busy]):
                assert isinstance(ready, Connection)
                try:
                    result, error = ready.recv()
                except EOFError:
                    raise BadInput(ENDED) from None
                busy.discard(ready)
                if error is not None:
                    raise error
                yield result
                self._next(ready, method, items, busy)

    @staticmethod
    def _next(pipe: Connection, method: str, items: Iterator[Any], busy: set[Connection]) -> None:
        for item in items:
            pipe.send((method, item))
            busy.add(pipe)
            return


def _serve(held: object, pipe: Connection) -> None:
    while True:
        try:
            method, item = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        answer: tuple[Any, Exception | None]
        try:
            answer = getattr(held, method)(item), None
        except Exception as error:
            answer = None, error
        pipe.send(answer)
