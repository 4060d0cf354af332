"""Fields of the config that have a range. Torch is not imported."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def number(default: Any, *, ge: float | None = None, gt: float | None = None, lt: float | None = None) -> Any:
    """A dataclass field with a range, checked by `validate`; NaN and infinities are outside every range."""
    return field(default=default, metadata={"ge": ge, "gt": gt, "lt": lt})
