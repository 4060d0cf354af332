"""Measures how long the tests take, relative to the speed of the machine: a pytest plugin (`--clock`) and its tables.

    python -m tests.clock          phases of each world, and the longest rows and tests of the last `pytest --clock`

The budget is in tests/budget.yaml. `pytest --durations` cannot divide the time of a world: it counts all rows for the
first test that needs one.
"""

import json
import time
from collections import defaultdict
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import yaml

BUDGET = yaml.safe_load((Path(__file__).parent / "budget.yaml").read_text())
KEY = "strategy-lab/times"  # in pytest's cache
PHASES = ("corpus", "mesh", "build", "steps", "gather", "compare")
LONGEST = 15


class Clock:
    """Measures the machine before the first test, and prints the comparison with the budget after the last one."""

    def __init__(self) -> None:
        from scripts.bench_step import bare_step_ms

        self.bare_step_ms = bare_step_ms()
        self.started = time.perf_counter()
        self.tests: defaultdict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.tests[report.nodeid] += report.duration

    def pytest_terminal_summary(self, terminalreporter: Any, config: pytest.Config) -> None:
        found = worlds(config._tmp_path_factory.getbasetemp())  # type: ignore[attr-defined]
        for world in found:
            self.tests[world["test"]] -= world["seconds"]
        times = {
            "selection": "fast" if "not slow" in config.option.markexpr else "all",
            "seconds": time.perf_counter() - self.started,
            "bare_step_ms": self.bare_step_ms,
            "tests": dict(self.tests),
            "worlds": found,
        }
        if (cache := getattr(config, "cache", None)) is not None:  # with `-p no:cacheprovider` there is none
            cache.set(KEY, times)
        terminalreporter.section("time")
        for line in summary(times):
            terminalreporter.line(line)


def worlds(base: Path) -> list[dict[str, Any]]:
    """The world.json of each world, with its name in the budget: the file of the tests and the number of ranks."""
    found = []
    for file in sorted(base.rglob("world.json")):
        world = json.loads(file.read_text())
        stem = Path(world["test"].partition("::")[0]).stem.removeprefix("test_")
        found.append(world | {"name": f"{stem} {world['size']}"})
    return found


def summary(times: dict[str, Any]) -> list[str]:
    """The total time with its budget, and the names of all that take more than their share of it."""
    ms, selection = times["bare_step_ms"], times["selection"]
    lines = [
        f"{times['seconds']:.0f} s. The bare step of tiny takes {ms:.0f} ms on this machine, so that is "
        f"{times['seconds'] / ms:.2f} s for each of these ms; the budget is {BUDGET['total'][selection]}."
    ]
    shares = BUDGET["worlds"][selection]
    costs = [(f"the world {name}", cost, shares.get(name, shares["other"])) for name, cost in by_world(times)]
    for world in times["worlds"]:
        costs += [(f"the row {name}", row["seconds"] or 0, BUDGET["row"]) for name, row in world["rows"].items()]
    costs += [(f"the test {name}", cost, BUDGET["test"]) for name, cost in times["tests"].items()]
    lines += [
        f"Over its share of {share * ms:.0f} s: {what}, {cost:.0f} s"
        for what, cost, share in costs
        if cost > share * ms
    ]
    inside = sum(world["seconds"] for world in times["worlds"])
    return [*lines, f"{inside:.0f} s of it were spent in {len(times['worlds'])} worlds: python -m tests.clock"]


def by_world(times: dict[str, Any]) -> list[tuple[str, float]]:
    """The seconds of each world, by its name in the budget."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for world in times["worlds"]:
        seconds[world["name"]] += world["seconds"]
    return sorted(seconds.items(), key=itemgetter(1), reverse=True)


def tables(times: dict[str, Any]) -> list[str]:
    """The phases of each world (`start`: processes, imports, the process group), and the longest rows and tests."""
    lines = [f"{'world':<22}{'rows':>5}{'s':>8}{'start':>8}" + "".join(f"{phase:>9}" for phase in PHASES)]
    rows: list[tuple[float, str]] = []
    for world in sorted(times["worlds"], key=lambda world: -world["seconds"]):
        timed = {name: row for name, row in world["rows"].items() if row["seconds"]}
        rows += [(row["seconds"], f"{name} ({world['name']})") for name, row in timed.items()]
        start = world["seconds"] - sum(row["seconds"] for row in timed.values())
        phases = [sum((row["phases"] or {}).get(phase, 0) for row in timed.values()) for phase in PHASES]
        figures = f"{len(timed):>5}{world['seconds']:>8.1f}{start:>8.1f}" + "".join(
            f"{phase:>9.1f}" for phase in phases
        )
        lines.append(f"{world['name']:<22}{figures}")
    lines += ["", "longest rows, s", *(f"{cost:>7.1f}  {name}" for cost, name in sorted(rows, reverse=True)[:LONGEST])]
    tests = sorted(times["tests"].items(), key=lambda item: -item[1])[:LONGEST]
    return [*lines, "", "longest tests, without their worlds, s", *(f"{cost:>7.1f}  {name}" for name, cost in tests)]


def main() -> None:
    file = Path(".pytest_cache") / "v" / KEY
    if not file.exists():
        raise SystemExit("no times were kept yet: run make test first")
    times = json.loads(file.read_text())
    print("\n".join([*summary(times), "", *tables(times)]))


if __name__ == "__main__":
    main()
