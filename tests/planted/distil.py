"""Bugs of distillation."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import nn

from tests.planted.base import Counter
from train.strategies.distil import apply


@contextmanager
def taught_other_tokens(counter: Counter) -> Iterator[None]:
    """A rank compares its tokens with those of the teacher in another order, as if both were cut in chunks alike."""
    original = apply.Distilled.answer

    def answer(self: apply.Distilled, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        counter.calls += 1
        args = original(self, module, args)
        return (*args[:2], args[2].flip(1)) if len(args) > 2 and dist.get_rank() > 0 else args

    with mock.patch.object(apply.Distilled, "answer", answer):
        yield


BUGS = (taught_other_tokens,)
