"""All that is wrong with a config in a world of a given size, with overrides that mend all of it together.

Pure functions of (config, world_size): no process group, no files, no torch. The rules themselves are in `rules/`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from train.command.rules import broken
from train.config.plan import Plan
from train.config.problems import Problem
from train.config.rule import Finding
from train.config.rules.ranges import OutOfRange, out_of_range, too_many_processes
from train.config.schema import Config

NUM_FIXES = 3  # shown; the first is the problem's own
MAX_DEPTH = 6  # lines of overrides that are put together
MAX_WIDTH = 8  # configs of a depth that are mended further: those that break the fewest rules
MAX_TRIES = 24  # lines of one rule that are tried on a config


def validate(config: Config, world_size: int) -> list[Problem]:
    """All problems at once, none of them caused by another: rules see values out of range as if they were mended.

    Each problem carries the same fix: overrides with which the whole has no problem. Where none was found the fix is
    the rule's own advice in words.
    """
    plan = Plan(config, world_size)
    ranges, found = findings(plan)
    if not ranges and not found:
        return []
    lines = mending(plan)
    shown = ", ".join(lines[:-1]) + (" or " if len(lines) > 1 else "") + lines[-1] if lines else ""
    overrides = tuple(lines[0].split()) if lines else ()
    broken = [(one.rule, one.message, "use a value in its range") for one in ranges]
    broken += [(rule, finding.message, finding.otherwise) for rule, finding in found.items()]
    return [Problem(rule, message, f"use {shown}" if shown else words, overrides) for rule, message, words in broken]


def findings(plan: Plan) -> tuple[list[OutOfRange], dict[str, Finding]]:
    """(Values out of range; the broken rules by name)."""
    many = too_many_processes(plan.world_size)
    ranges = [*([many] if many else []), *out_of_range(plan.config)]
    if many:
        return ranges, {}
    for one in ranges:
        plan = plan.override(one.override)
    return ranges, broken(plan)


@dataclass(frozen=True)
class Candidate:
    """Overrides by key, the plan with them, whether a value in it is out of range, and the rules that it breaks."""

    words: dict[str, str]
    plan: Plan
    out_of_range: bool
    found: dict[str, Finding]

    @property
    def line(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.words.items())

    def overridden(self, line: str) -> Candidate:
        plan = self.plan.override(line)
        ranges, found = findings(plan)
        return Candidate(self.words | dict(word.split("=", 1) for word in line.split()), plan, bool(ranges), found)

    def lines(self, *, of_all: bool) -> Iterator[str]:
        """What the broken rules propose, or the first of them alone."""
        for finding in [*self.found.values()][: None if of_all else 1]:
            yield from finding.fixes[:MAX_TRIES]


def mending(plan: Plan) -> list[str]:
    """Up to NUM_FIXES lines of overrides, each of which leaves no problem; the shortest, and what rules name first.

    Lines that one rule proposes are tried alone, then together with those of the rules that are still broken.
    """
    ranges, found = findings(plan)
    start = Candidate({}, plan, bool(ranges), found)
    for one in ranges:
        start = start.overridden(one.override)
    if not start.found:
        return [start.line]
    level = [start]
    for depth in range(MAX_DEPTH):
        tried = [one for one in _next_level(level, of_all=depth == 0) if not one.out_of_range]
        if working := _without_longer(one for one in tried if not one.found):
            return [_shortest(plan, one).line for one in working]
        level = sorted(tried, key=lambda one: len(one.found))[:MAX_WIDTH]
    return []


def completed(problem: Problem, plan: Plan) -> Problem:
    """A problem that was found elsewhere, as in a text: its override, of one key, as the rules allow it, with what must
    change beside it; without an override where nothing was found."""
    if not problem.overrides:
        return problem
    (word,) = problem.overrides
    key, _, value = word.partition("=")
    values = [value]
    if key == "train.seq_len":  # a shorter one will do, and what splits sequences wants multiples
        values = [*dict.fromkeys(str(int(value) >> k << k) for k in range(int(value).bit_length()))]
    lines = [f"{key}={one}" for one in values if not _broken(plan.override(f"{key}={one}"))]
    others = [] if lines else [line for line in mending(plan.override(word)) if f"{key}=" not in line]
    lines += [f"{word} {line}" for line in others]
    if not lines:
        fix = f"{problem.fix}, and change what does not go with it"
        return replace(problem, fix=fix, overrides=())
    return replace(problem, fix=problem.fix.replace(word, lines[0]), overrides=tuple(lines[0].split()))


def _broken(plan: Plan) -> bool:
    ranges, found = findings(plan)
    return bool(ranges or found)


def _next_level(level: list[Candidate], *, of_all: bool) -> Iterator[Candidate]:
    seen: set[frozenset[tuple[str, str]]] = set()
    for one in level:
        for line in dict.fromkeys(one.lines(of_all=of_all)):
            candidate = one.overridden(line)
            key = frozenset(candidate.words.items())
            if key not in seen:
                seen.add(key)
                yield candidate


def _without_longer(working: Iterable[Candidate]) -> list[Candidate]:
    """The first NUM_FIXES that do not hold another's words and more."""
    kept: list[Candidate] = []
    for one in working:
        if not any(other.words.items() <= one.words.items() for other in kept):
            kept.append(one)
        if len(kept) == NUM_FIXES:
            break
    return kept


def _shortest(plan: Plan, one: Candidate) -> Candidate:
    """Without the words that a later one has made needless."""
    for key in [*one.words] if len(one.words) > 1 else []:
        words = {name: value for name, value in one.words.items() if name != key}
        fewer = replace(one, words=words)
        if not _broken(plan.override(fewer.line)):
            one = fewer
    return one
