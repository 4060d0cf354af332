"""Bugs of inputs that are offloaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from torch import Tensor

from tests.planted.base import Counter
from train.strategies.offload.apply import Input


@contextmanager
def input_of_the_layer_before(counter: Counter) -> Iterator[None]:
    """The backward of a layer gets the input that was fetched for the next one."""
    original = Input.taken

    def taken(self: Input) -> Tensor:
        counter.calls += 1
        before, x = self.before, original(self)
        if before is not None and before.x is not None:
            x.copy_(before.x)
        return x

    with mock.patch.object(Input, "taken", taken):
        yield


BUGS = (input_of_the_layer_before,)
