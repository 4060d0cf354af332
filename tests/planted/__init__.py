"""Bugs that people really make, patched into the product's own functions where they make them."""

from tests.planted import data, deepspeed, tensor
from tests.planted.base import Bug, Counter

BUGS: dict[str, Bug] = {bug.__name__: bug for bug in (*data.BUGS, *tensor.BUGS, *deepspeed.BUGS)}

__all__ = ["BUGS", "Counter"]
