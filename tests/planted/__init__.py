"""Realistic bugs, patched into the product's own functions in the places where people make them."""

from tests.planted import (
    chunked_loss,
    context,
    data,
    deepspeed,
    distil,
    dropout,
    evaluation,
    expert,
    offload,
    pipeline,
    quantise,
    reference,
    saving,
    tensor,
)
from tests.planted.base import Bug, Counter

_SUBJECTS = (
    data,
    tensor,
    pipeline,
    context,
    expert,
    deepspeed,
    dropout,
    evaluation,
    reference,
    saving,
    quantise,
    distil,
    chunked_loss,
    offload,
)
BUGS: dict[str, Bug] = {bug.__name__: bug for subject in _SUBJECTS for bug in subject.BUGS}

__all__ = ["BUGS", "Counter"]
