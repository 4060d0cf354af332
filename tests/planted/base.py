"""The base of the planted bugs."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass


@dataclass
class Counter:
    """Counts how often the patched line ran, because a bug that never ran proves nothing."""

    calls: int = 0


Bug = Callable[[Counter], AbstractContextManager[None]]
