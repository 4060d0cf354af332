"""The equivalence table: each row is a config that must equal one device, on a world of the given size.

All rows train two layers (a pipeline one a stage at least) on real text, with accumulation (two microbatches, in a
pipeline as many as there are sequences), and with a masked token (the space), so that ranks and microbatches have
unequal numbers of valid tokens.
"""

from tests.rows import context, data, expert, pairwise, pipeline, products, tensor
from tests.rows.base import Row

_SUBJECTS = (data, tensor, pipeline, context, expert, products, pairwise)
ROWS: list[Row] = [row for subject in _SUBJECTS for row in subject.ROWS]
SLOW_ROWS: list[Row] = [row for subject in _SUBJECTS for row in subject.SLOW_ROWS]
