"""The rules, on configs drawn by hypothesis: fixes work, problems without a fix are explained, valid configs run."""

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from tempfile import NamedTemporaryFile
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from tests.drawn import NATIVE, Drawn, drawn
from tests.proven import OF_THE_STRATEGY
from tests.rows import pairwise
from tests.rows.base import F64, Row
from tests.running import run_rows
from tests.test_equivalence import assert_green
from train.command.validate import validate
from train.config.problems import Problem

NUM_VALID = 3 * len(NATIVE)  # three of each preset; tests/many_drawn.py draws hundreds
SEED = 3


def rules(drawn: Drawn, *words: str) -> dict[str, Problem]:
    plan = drawn.plan.override(" ".join(words))
    return {problem.rule: problem for problem in validate(plan.config, plan.world_size)}


@settings(max_examples=500, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(drawn())
def test_what_is_offered_leaves_no_problem(drawn: Drawn) -> None:
    found = rules(drawn)
    for problem in found.values():
        assert problem.message and problem.fix
        if not problem.overrides:
            assert "=" not in problem.fix, f"an override is offered that was not tried: {problem}"
            continue
        for line in re.split(", | or ", problem.fix.removeprefix("use ")):
            assert not rules(drawn, line), f"{problem}: {line} leaves {rules(drawn, line).keys()}"


def valid_configs(number: int, presets: list[str], largest: int, most_changes: int) -> list[Drawn]:
    """This many different valid configs, drawn with a fixed seed."""
    chosen: dict[Drawn, None] = {}

    @settings(max_examples=4 * number, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(drawn(presets, most_changes, compiled=False))
    def collect(one: Drawn) -> None:
        one = one.mended()
        # async_tp needs NCCL and a compiler: tests/test_async_tp.py
        if one.world_size <= largest and not rules(one) and not getattr(one.plan.config.strategy, "async_tp", False):
            chosen[one] = None

    collect()
    found = sorted(chosen, key=lambda one: (one.overrides, one.world_size))
    random.Random(SEED).shuffle(found)
    by_preset = Counter[str]()  # every preset as often as any other, as far as there are enough
    order = []
    for one in found:
        by_preset[one.overrides[0]] += 1
        order.append((by_preset[one.overrides[0]], one))
    order.sort(key=lambda pair: pair[0])
    return [one for _, one in order[:number]]


def run_fake(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The jobs that raised."""
    with NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(jobs, file)
        file.flush()
        command = [sys.executable, "-m", "tests.fake_worker", file.name]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def drawn_jobs() -> list[dict[str, Any]]:
    """One rank of each of NUM_VALID configs: first one of each preset, then the others. DeepSpeed's engines are left
    out, because they need a real process group. test_deepspeed.py has their rows."""
    configs = valid_configs(NUM_VALID, NATIVE, 64, 6)
    assert len(configs) == NUM_VALID
    assert {one.overrides[0] for one in configs[: len(NATIVE)]} == {f"strategy={name}" for name in NATIVE}
    ranks = random.Random(SEED)
    return [
        {"overrides": list(one.overrides), "world_size": one.world_size, "rank": ranks.randrange(one.world_size)}
        for one in configs
    ]


def none_raises(jobs: list[dict[str, Any]]) -> None:
    """Run the jobs, in two processes for two cores."""
    with ThreadPoolExecutor() as both:
        failures = [failure for found in both.map(run_fake, [jobs[::2], jobs[1::2]]) for failure in found]
    for failure in failures:
        print(failure["world_size"], failure["rank"], *failure["overrides"], "\n", failure["error"][-600:])
    assert not failures, f"{len(failures)} of {len(jobs)} valid configs raised"


@pytest.mark.timeout(300)
def test_what_is_valid_builds_and_steps():
    """One config of each preset. tests/test_ledger.py does the same with the others, and compares what they send."""
    none_raises(drawn_jobs()[: len(NATIVE)])


@cache
def of_eight_ranks() -> list[Drawn]:
    return valid_configs(200, NATIVE, 8, 6)


def rows_of(size: int) -> list[Row]:
    """Drawn configs as rows of the equivalence table, in float64, without dropout and compression."""
    rows = []
    for one in of_eight_ranks():
        words = [word for word in one.overrides if not word.startswith(("precision=", "model.dropout="))]
        if one.world_size == size and getattr(one.plan.config.strategy, "comm_hook", "none") == "none":
            strategy = [word for word in words if word.startswith(OF_THE_STRATEGY)]
            rows.append(Row(size, tuple(strategy), (F64, *(word for word in words if word not in strategy))))
    return rows


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("size", "number"), [(2, 3), (4, 4), (8, 2)])
def test_what_is_valid_equals_one_device(size, number, tmp_path):
    rows = random.Random(SEED).sample(rows_of(size), number)
    results = run_rows(tmp_path, rows)
    for row in rows:
        print(row.name)
        assert_green(results[row.name])


@pytest.mark.slow
def test_pairwise_rows_cover_every_pair_that_the_rules_allow():
    table = [tuple(line.split()) for line in pairwise.TABLE.strip().splitlines()]
    covered = set().union(*map(pairwise.pairs, table))
    missing = sorted(pairwise.all_pairs() - covered)
    draw = random.Random(SEED)
    allowed = {pair: found[0] for pair in missing if (found := pairwise.with_pair(pair, pairwise.TRIES, draw))}
    assert not allowed, "pairs that some valid config has, and no row"
    assert all(map(pairwise.is_valid, table))
    # nothing goes without a reason: these are what the rules refuse, or what needs 16 ranks
    print(len(covered), "covered;", *(f"{x} with {y}" for (_, x), (_, y) in missing), sep="\n")
