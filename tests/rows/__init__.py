"""The equivalence table: each row is a config that must equal one device, on a world of the given size.

All rows train two layers (a pipeline at least one for each stage) on real text. They use accumulation: two
microbatches, or in a pipeline as many as there are sequences. One token (the space) is masked, so that ranks and
microbatches have different numbers of valid tokens.
"""

from tests.rows import (
    auto,
    chunked_loss,
    context,
    data,
    expert,
    float8,
    offload,
    pairwise,
    pipeline,
    products,
    quantise,
    tensor,
)
from tests.rows.base import Row, quickest

_SUBJECTS = (
    data,
    tensor,
    pipeline,
    context,
    expert,
    quantise,
    float8,
    chunked_loss,
    offload,
    products,
    pairwise,
    auto,
)
ROWS: list[Row] = [row for subject in _SUBJECTS for row in subject.ROWS]
QUICK_ROWS: list[Row] = quickest(ROWS)
SLOW_ROWS: list[Row] = [row for subject in _SUBJECTS for row in subject.SLOW_ROWS]
