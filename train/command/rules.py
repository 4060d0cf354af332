"""All rules about the values of a config and the number of processes. They are pure functions of a `Plan`."""

from __future__ import annotations

from collections.abc import Iterator

from train.command.idle import idle_options
from train.config.plan import Plan
from train.config.rule import Finding, Rule
from train.config.rules import batch, corpus, elastic, layout, mixture, model, places, read_when
from train.strategies.techniques import used

# they read neither the strategy nor how a batch is cut into microbatches, nor what is recomputed
OF_EVERY_LAYOUT: tuple[Rule, ...] = (*model.RULES, *read_when.RULES, *mixture.RULES, *corpus.RULES)
AFTER: tuple[Rule, ...] = (*batch.RULES, *places.RULES, *elastic.RULES)


def rules(plan: Plan) -> Iterator[Rule]:
    """The rules that hold for the plan: the general ones, and those of the techniques that it uses."""
    yield from layout.RULES
    yield from OF_EVERY_LAYOUT
    yield from _of_techniques(plan)
    yield from AFTER


def rules_of_layout(plan: Plan) -> Iterator[Rule]:
    """The rules that another layout of the same config may follow or break."""
    yield from layout.RULES
    yield from _of_techniques(plan)
    yield from AFTER


def _of_techniques(plan: Plan) -> Iterator[Rule]:
    return (rule for technique in used(plan) for rule in technique.rules)


def broken(plan: Plan) -> dict[str, Finding]:
    """The broken rules by name."""
    found = {rule.name: finding for rule in rules(plan) if (finding := rule.check(plan)) is not None}
    return {**found, **idle_options(plan)}
