"""Options of a strategy without effect are refused: the strategy does not use the technique that they belong to.

The degrees of the mesh do not count as options: they decide which techniques are used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from train.command.presets import strategies
from train.config.fields import default_of
from train.config.plan import Plan
from train.config.rule import Finding
from train.config.rules.idle import written
from train.config.schema import Config, ModelConfig
from train.config.strategy import Strategy
from train.config.technique import Technique
from train.strategies.techniques import TECHNIQUES

MAX_NAMED = 8  # presets in a message


def idle_options(plan: Plan) -> dict[str, Finding]:
    """One finding, by the name of its rule, for each option that does not have its default and whose technique does not
    apply."""
    strategy, found = plan.config.strategy, {}
    for technique, option in options(strategy):
        value = getattr(strategy, option.name)
        if value == default_of(option) or technique.applies(plan):
            continue
        key = f"strategy.{option.name}"
        message = f"{key}={written(value)} has no effect: strategy={strategy.name} does not use {technique.name} here"
        if users := listed(option.name):
            message += f" ({users} do)"
        found[f"idle {key}"] = Finding(message, (f"{key}={written(default_of(option))}",))
    return found


def options(strategy: Strategy) -> Iterator[tuple[Technique, dataclasses.Field[Any]]]:
    """Every option of the strategy with the technique that owns it."""
    own = {field.name: field for field in dataclasses.fields(strategy)}
    for technique in TECHNIQUES:
        if isinstance(strategy, technique.keys):
            inherited = {field.name for field in dataclasses.fields(Strategy)}
            for field in dataclasses.fields(technique.keys):
                if field.name not in inherited and field.name not in technique.axes:
                    yield technique, own[field.name]


def presets_with(option: str) -> list[str]:
    """The presets that use the technique to which the option belongs."""
    owners = [one for one in TECHNIQUES if option in {field.name for field in dataclasses.fields(one.keys)}]
    if not owners:
        return [name for name, strategy in strategies().items() if hasattr(strategy, option)]
    plans = {name: Plan(Config(strategy=strategy, model=ModelConfig()), 1) for name, strategy in strategies().items()}
    degree = any(option in one.axes for one in TECHNIQUES)  # which every preset of such a dataclass has, and few give
    return [
        name
        for name, plan in plans.items()
        if any(one.applies(plan) for one in owners)
        and not (degree and getattr(plan.config.strategy, option, None) is None)
    ]


def listed(option: str) -> str:
    """`presets_with` as text for a message."""
    names = presets_with(option)
    return ", ".join(names[:MAX_NAMED]) + (", …" if len(names) > MAX_NAMED else "")
