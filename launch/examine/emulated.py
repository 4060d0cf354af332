"""Whether launch.netlab can emulate hosts here, and what a killed one has left, which is ended."""

from __future__ import annotations

from launch.emulating.namespaces import has_netem, rights
from launch.emulating.record import clean_up
from launch.examine.finding import Finding, ok, warning
from train.config.problems import BadInput

SUBJECT, LIMIT_S = "emulated hosts", 2.0


def judge() -> list[Finding]:
    found = [warning(SUBJECT, line, "nothing: it was ended just now") for line in clean_up()]
    try:
        how = rights(LIMIT_S)
    except BadInput as refused:
        (problem,) = refused.problems
        # nothing but launch.netlab needs them
        return [*found, ok(SUBJECT, f"launch.netlab cannot run here: {problem.message}; {problem.fix}", allowed=False)]
    netem = has_netem(how, LIMIT_S)
    way = "in a user namespace" if how.rootless else "as root"
    also = "with delays and losses" if netem else "without delays and losses, as this kernel has no netem"
    return [
        *found,
        ok(SUBJECT, f"launch.netlab can run, {way}, {also}", allowed=True, rootless=how.rootless, netem=netem),
    ]
