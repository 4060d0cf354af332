"""Bugs of pipelines."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from tests.planted.base import Counter
from train.ranks import gradients
from train.strategies.pipeline import stages


@contextmanager
def pipeline_scale(counter: Counter) -> Iterator[None]:
    """The loss is divided by the global number of tokens, and then gradients also by the number of microbatches."""
    original = stages.build_schedule

    def build_schedule(*args: Any, **kwargs: Any) -> Any:
        counter.calls += 1
        schedule = original(*args, **kwargs)
        schedule.scale_grads = True  # torch's default
        return schedule

    with mock.patch.object(stages, "build_schedule", build_schedule):
        yield


@contextmanager
def tied_gradients_not_summed(counter: Counter) -> Iterator[None]:
    """Tied weights: the first stage uses only the gradient of the embedding, the last one only that of the logits."""

    def sum_shared(shared: Any, device: Any) -> None:
        counter.calls += len(shared)

    with mock.patch.object(gradients, "sum_shared", sum_shared):
        yield


BUGS = (pipeline_scale, tied_gradients_not_summed)
