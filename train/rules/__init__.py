"""Every rule between the values of a config and the size of the world, by subject. Pure functions of a `Plan`."""

from train.rules import batch, deepspeed, layout, model, pipeline, tensor
from train.rules.base import Rule

RULES: tuple[Rule, ...] = (*layout.RULES, *model.RULES, *tensor.RULES, *batch.RULES, *pipeline.RULES, *deepspeed.RULES)
