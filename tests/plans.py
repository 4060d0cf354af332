"""Makes plans from command lines, for tests."""

from functools import cache

from train.command import cli
from train.config.plan import Plan

PARSER = cli.parser("test", "")


@cache
def composed(*presets):
    return cli.parse(PARSER, [*presets])[0]


def plan_of(line):
    """The plan of a command line. Each preset is composed only once, and then keys are set on its config."""
    words = line.split()
    presets = [word for word in words if word.split("=")[0] in ("strategy", "model", "data", "hardware")]
    return Plan(composed(*presets), 1).override(" ".join(word for word in words if word not in presets))
