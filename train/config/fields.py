"""The fields of the config's dataclasses: each has a sentence of help, and numbers have a range. Torch is not imported.

Every integer has an upper bound, so that no check loops for minutes over values that nobody can run. The bounds are
wide: they allow worlds of 32,768 devices and models much larger than 405 B parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import field
from typing import Any

MAX_RANKS = 32_768  # processes, and so the degree of an axis
MAX_LAYERS = 4_096
MAX_WIDTH = 2**20  # of the model, and the number of its heads
MAX_COLUMNS = 2**22  # of a feed-forward
MAX_EXPERTS = 65_536
MAX_VOCABULARY = 2**24
MAX_TOKENS = 2**24  # of a sequence
MAX_SEQUENCES = 2**24  # of a batch
MAX_STEPS = 10**9
MAX_INT64 = 2**63 - 1
MAX_TIMEOUT_S = 30 * 24 * 3600
MAX_FIGURE = 1e9  # of a device
MAX_BUCKET_MB = 2**20
LARGE = 1e30  # the maximum of a float, so that a float32 can hold it and its products with other numbers
IGNORE_INDEX = -100  # marks a target without loss, as torch's cross_entropy does by default


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a dataclass field, made anew where a factory makes it; OmegaConf's MISSING if it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def key(default: Any, help: str, *, choices: Iterable[str] = ()) -> Any:
    """A dataclass field that is a key of the config.

    `default`: its value, or a type (`list`, `dict`, a group) that is called for each config. `help`: one sentence that
    says what the key does, with its unit; `--help` and docs/configuration.md show it. `choices`: the values that a text
    may have, where a rule or the machine checks them. An enum needs no `choices`.
    """
    metadata = {"help": help, "choices": tuple(choices)}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def number(
    default: Any,
    help: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    example: float | None = None,
) -> Any:
    """A key that is a number with a range, checked by `validate`; NaN and infinities are outside every range.

    `help`: as for `key`. `example`: a value that fixes propose if the field has no default.
    """
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    return field(default=default, metadata={"help": help, "bounds": bounds, "example": example})
