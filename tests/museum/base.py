"""What the museum consists of: exhibits, the sources of those that were published, and helpers to plant bugs."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from tests.rows import Row

# The parts of a step after the backward, in order, where a bug may be although all activations and gradients are right.
PARTS = ("gradients", "norm", "clip", "moments", "weights", "replicas", "evaluate")
KINDS = (
    "factor",
    "own part only",
    "one part missing",
    "positions",
    "mask",
    "stale",
    "rounding",
    "counted more than once",
    "weight decay",
    "replicas differ",
    "unknown",
)


@dataclass(frozen=True)
class Source:
    """Where a bug was published. `number`: of the issue or pull request. `what`: what it did, in whole sentences.
    `lived`: how long, as far as it can be known."""

    project: str
    number: str
    url: str
    what: str
    lived: str = "not known"


@dataclass(frozen=True)
class Exhibit:
    """A planted bug in a config, and what the proof should say about it.

    `module`: the global name of the module whose output is the first wrong one in forward order, or else whose output's
    gradient is the first wrong one in backward order; if all of these are right, one of PARTS. If a module's output has
    a right gradient and its input a wrong one, it is this module. `axis`: the mesh axis along which the mistake is
    made, or empty. `kind`: one of KINDS. `source`: None for the lab's own bugs. `before`: the module, axis and kind
    that were expected before the localiser was first run, if they were changed afterwards.
    """

    bug: str
    row: Row
    module: str
    axis: str
    kind: str
    source: Source | None = None
    before: tuple[str, str, str] | None = None


@contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Replace an attribute by what `make` gives for the original."""
    with mock.patch.object(owner, name, make(getattr(owner, name))):
        yield


def after(owner: Any, name: str, act: Callable[..., None]) -> AbstractContextManager[None]:
    """Call `act` with the arguments of each call of a function, after the call."""

    def make(original: Any) -> Any:
        def changed(*args: Any, **options: Any) -> Any:
            result = original(*args, **options)
            act(*args, **options)
            return result

        return changed

    return replaced(owner, name, make)
