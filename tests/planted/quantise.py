"""Bugs of quantisation-aware training."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from torch import Tensor

from tests.planted.base import Counter
from train.strategies.quantise import apply, rounding


@contextmanager
def range_of_own_rows(counter: Counter) -> Iterator[None]:
    """Activations are rounded with one range for all tokens of the microbatch, which differ from rank to rank."""

    def rounded_activation(x: Tensor) -> Tensor:
        counter.calls += 1
        return rounding.rounded_activation(x.flatten()).view_as(x)

    with mock.patch.object(apply, "rounded_activation", rounded_activation):
        yield


BUGS = (range_of_own_rows,)
