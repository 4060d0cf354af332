"""The differences that a comparison allows a run. They depend on the strategy in its config, and not on what it says.

The files of a run say whether its strategy differs from one device, and within which bound; this is for readers. It is
not trusted here: the strategy is created again from config.yaml, with the classes of this source tree.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache

from scripts.comparing.runs import Run
from train.config.schema import EIGHT_BITS, Optimiser
from train.config.strategy import Strategy
from train.record.run_files import Record

PREFIX = "strategy."


@dataclass(frozen=True)
class Excuse:
    """`reasons`: why the loss may differ by any finite amount. `bound`: the relative difference allowed otherwise."""

    reasons: tuple[str, ...] = ()
    bound: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether there is no excuse, so that the run must compute the same as one device."""
        return not self.reasons and not self.bound


def excuse_of(run: Run) -> Excuse:
    strategy = strategy_of(
        {key.removeprefix(PREFIX): value for key, value in run.config.items() if key.startswith(PREFIX)}
    )
    if strategy is None:
        return Excuse()
    lossy = strategy.lossy()
    unbounded = (str(lossy),) if lossy and lossy.bound is None else ()
    rounded = (EIGHT_BITS,) if run.config.get("optim.name") == Optimiser.adamw8bit.value else ()
    return Excuse((*strategy.differs(), *unbounded, *rounded), strategy.lossy_bound())


def strategy_of(values: Record) -> Strategy | None:
    """The strategy with these keys; None if there is no such strategy, or a value has the wrong type."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    kinds = [kind for kind, names in _kinds().items() if values and set(values) <= names]
    if not kinds or any(isinstance(value, str) and "${" in value for value in values.values()):
        return None  # an interpolation could read the environment of this machine
    kind = min(kinds, key=lambda kind: len(_kinds()[kind]))
    try:
        made = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), values))
    except (OmegaConfBaseException, ValueError, TypeError):
        return None
    assert isinstance(made, Strategy)
    return made


@lru_cache(maxsize=1)
def _kinds() -> dict[type, set[str]]:
    """The classes of strategies, with their keys."""
    from train.command.schemas import SCHEMAS

    return {
        schema: {field.name for field in dataclasses.fields(schema)}
        for (group, _), schema in SCHEMAS.items()
        if group == "strategy"
    }
