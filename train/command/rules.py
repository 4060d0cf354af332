"""Every rule between the values of a config and the size of the world, by subject. Pure functions of a `Plan`."""

from train.config.rule import Rule
from train.config.rules import batch, corpus, layout, model, places, read_when
from train.strategies.context import rules as context
from train.strategies.data import rules as data
from train.strategies.deepspeed import rules as deepspeed
from train.strategies.expert import rules as expert
from train.strategies.pipeline import rules as pipeline
from train.strategies.tensor import rules as tensor

_SUBJECTS = (layout, model, read_when, corpus, data, tensor, context, expert, batch, pipeline, deepspeed, places)
RULES: tuple[Rule, ...] = tuple(rule for subject in _SUBJECTS for rule in subject.RULES)
