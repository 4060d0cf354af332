"""All problems of a config with a given number of processes, with overrides that fix all of them together.

These are pure functions of (config, world_size): no process group, no files, no torch. `rules.py` collects the rules.
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

NUM_FIXES = 3  # fixes that a message shows
MAX_DEPTH = 6  # fixes of rules that are combined
MAX_WIDTH = 8  # configs per depth to which further fixes are applied: those that break the fewest rules
MAX_TRIES = 24  # fixes of one rule that are tried on a config


def validate(config: Config, world_size: int) -> list[Problem]:
    """All problems at once. Values out of range are corrected before the rules are checked, so that they cause no
    further problems.

    Every problem has the same fix: overrides with which no problem is left. If no such overrides were found, the fix is
    the rule's own advice in words.
    """
    plan = Plan(config, world_size)
    ranges, found = findings(plan)
    if not ranges and not found:
        return []
    lines = find_fixes(plan)
    shown = ", ".join(lines[:-1]) + (" or " if len(lines) > 1 else "") + lines[-1] if lines else ""
    overrides = tuple(lines[0].split()) if lines else ()
    broken = [(one.rule, one.message, "use a value in its range") for one in ranges]
    broken += [(rule, finding.message, finding.otherwise) for rule, finding in found.items()]
    return [Problem(rule, message, f"use {shown}" if shown else words, overrides) for rule, message, words in broken]


def findings(plan: Plan) -> tuple[list[OutOfRange], dict[str, Finding]]:
    """(values out of range, broken rules by name)."""
    many = too_many_processes(plan.world_size)
    ranges = [*([many] if many else []), *out_of_range(plan.config)]
    if many:
        return ranges, {}
    for one in ranges:
        plan = plan.override(one.override)
    return ranges, broken(plan)


@dataclass(frozen=True)
class Candidate:
    """Overrides by key, the plan with them, whether it has a value out of range, and the rules that it breaks."""

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
        """The fixes that the broken rules propose: of all rules, or of the first one."""
        for finding in [*self.found.values()][: None if of_all else 1]:
            yield from finding.fixes[:MAX_TRIES]


def find_fixes(plan: Plan) -> list[str]:
    """Up to NUM_FIXES lines of overrides, each of which leaves no problem, in the rules' order of preference.

    The fixes of each rule are tried alone first, then together with fixes of the rules that are still broken.
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
    """A problem that was found elsewhere, for example in a text, with a fix that breaks no rule. `problem` proposes one
    override; its value may be changed, and overrides of other keys may be added. If no valid fix is found, the result
    has no overrides."""
    if not problem.overrides:
        return problem
    (word,) = problem.overrides
    key, _, value = word.partition("=")
    values = [value]
    if key == "train.seq_len":  # shorter sequences are possible too, and techniques that split sequences need multiples
        values = [*dict.fromkeys(str(int(value) >> k << k) for k in range(int(value).bit_length()))]
    lines = [f"{key}={one}" for one in values if not _broken(plan.override(f"{key}={one}"))]
    others = [] if lines else [line for line in find_fixes(plan.override(word)) if f"{key}=" not in line]
    lines += [f"{word} {line}" for line in others]
    if not lines:
        fix = f"{problem.fix}, and change the keys that are not supported with it"
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
    """The first NUM_FIXES, without those that contain all overrides of another one and more."""
    kept: list[Candidate] = []
    for one in working:
        if not any(other.words.items() <= one.words.items() for other in kept):
            kept.append(one)
        if len(kept) == NUM_FIXES:
            break
    return kept


def _shortest(plan: Plan, one: Candidate) -> Candidate:
    """The candidate without overrides that became unnecessary because of later ones."""
    for key in [*one.words] if len(one.words) > 1 else []:
        words = {name: value for name, value in one.words.items() if name != key}
        fewer = replace(one, words=words)
        if not _broken(plan.override(fewer.line)):
            one = fewer
    return one
