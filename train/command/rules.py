"""Every rule between the values of a config and the size of the world. Pure functions of a `Plan`."""

from __future__ import annotations

from collections.abc import Iterator

from train.command.idle import idle_options
from train.config.plan import Plan
from train.config.rule import Finding, Rule
from train.config.rules import batch, corpus, layout, mixture, model, places
from train.strategies.techniques import used

BEFORE: tuple[Rule, ...] = (*layout.RULES, *model.RULES, *mixture.RULES, *corpus.RULES)
AFTER: tuple[Rule, ...] = (*batch.RULES, *places.RULES)


def rules(plan: Plan) -> Iterator[Rule]:
    """Those that are asked of the plan: of no technique, and of the techniques that it uses."""
    yield from BEFORE
    yield from (rule for technique in used(plan) for rule in technique.rules)
    yield from AFTER


def broken(plan: Plan) -> dict[str, Finding]:
    """The broken rules by name."""
    found = {rule.name: finding for rule in rules(plan) if (finding := rule.check(plan)) is not None}
    return {**found, **idle_options(plan)}
