"""Bugs of checkpoints: state that is not saved, not restored, or restored in the wrong place."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from tests.planted.base import Counter
from train import step
from train.checkpoint import state
from train.ranks.state import Piece


def _not_read(counter: Counter, leave_out: Callable[[Piece], bool]) -> Any:
    """Pieces that `leave_out` names keep the value that they had before the checkpoint was read."""
    original = state.read_pieces

    def read_pieces(pieces: Any, *where: Any) -> None:
        wanted = [*pieces]
        counter.calls += any(map(leave_out, wanted))
        original([piece for piece in wanted if not leave_out(piece)], *where)

    return mock.patch.object(state, "read_pieces", read_pieces)


@contextmanager
def moments_not_restored(counter: Counter) -> Iterator[None]:
    """The optimiser's averages begin again at zero."""
    with _not_read(counter, lambda piece: piece.kind == "exp_avg"):
        yield


@contextmanager
def count_not_restored(counter: Counter) -> Iterator[None]:
    """The optimiser counts its updates anew, so that its correction of the averages is that of the first step."""
    with _not_read(counter, lambda piece: piece.kind == "step"):
        yield


@contextmanager
def biases_not_restored(counter: Counter) -> Iterator[None]:
    """The routers' biases, which are buffers and no parameters, begin again at zero."""
    with _not_read(counter, lambda piece: piece.kind == "buffer"):
        yield


@contextmanager
def masks_begin_again(counter: Counter) -> Iterator[None]:
    """The state of the random generators is not restored."""

    def forget(folder: Any, states: Any) -> None:
        counter.calls += 1

    with mock.patch.object(state, "_set_random_state", forget):
        yield


@contextmanager
def buckets_not_rebuilt(counter: Counter) -> Iterator[None]:
    """The first step after the resume sums in DDP's first buckets, and not in those of the undisturbed run."""

    def rehearse(self: Any) -> None:
        counter.calls += 1

    with mock.patch.object(step.Step, "rehearse", rehearse):
        yield


@contextmanager
def hook_begins_again(counter: Counter) -> Iterator[None]:
    """The error that compression has kept back is lost."""
    with mock.patch.object(step.Step, "load_own_state", lambda self, tensors: setattr(counter, "calls", 1)):
        yield


@contextmanager
def codes_not_restored(counter: Counter) -> Iterator[None]:
    """Moments in 8 bits are quantised anew from the numbers that every layout can read."""
    with hook_begins_again(counter):
        yield


BUGS = (
    moments_not_restored,
    count_not_restored,
    biases_not_restored,
    masks_begin_again,
    buckets_not_rebuilt,
    hook_begins_again,
    codes_not_restored,
)
