"""Every rule between the values of a config and the size of the world, by subject. Pure functions of a `Plan`."""

from train.rules import batch, context, corpus, data, deepspeed, expert, layout, model, pipeline, places, tensor
from train.rules.base import Rule

_SUBJECTS = (layout, model, corpus, data, tensor, context, expert, batch, pipeline, deepspeed, places)
RULES: tuple[Rule, ...] = tuple(rule for subject in _SUBJECTS for rule in subject.RULES)
