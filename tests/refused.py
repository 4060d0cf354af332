"""What tests of rules share."""

from collections.abc import Sequence

from train.command import cli
from train.config.plan import Plan


def assert_refused_with_a_fix(words: Sequence[str], size: int, rule: str) -> None:
    """The rule refuses these overrides on so many processes, and what it offers leaves no problem."""
    plan = Plan(cli.configured([*words]), size)
    found = {problem.rule: problem for problem in cli.problems(plan.config, size)}
    assert rule in found and found[rule].overrides
    mended = plan.override(" ".join(found[rule].overrides))
    assert not cli.problems(mended.config, mended.world_size)
