"""What a planted bug needs."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass


@dataclass
class Counter:
    """How often the patched line ran: a bug that never ran proves nothing."""

    calls: int = 0


Bug = Callable[[Counter], AbstractContextManager[None]]
