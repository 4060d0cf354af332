"""Bugs of tensor parallelism."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from tests.planted.base import Counter
from train.strategies import tensor


@contextmanager
def norm_gradient_not_summed(counter: Counter) -> Iterator[None]:
    """Under sequence parallelism a norm sees a shard of the tokens, but its gradient is taken for whole."""

    def forward(self: Any, x: Any) -> Any:
        counter.calls += 1
        return self.normalise(x, self.weight.to_local())

    with mock.patch.object(tensor.SequenceParallelRMSNorm, "forward", forward):
        yield


BUGS = (norm_gradient_not_summed,)
