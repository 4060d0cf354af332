"""With the defaults, every preset runs with 1, 2, 4 and 8 processes if its own degrees divide the number. Any other
number is refused with a fix, and applying the fixes gives a valid layout."""

import math
from functools import cache

import pytest

from tests.drawn import PRESETS
from train.command import cli
from train.command.validate import validate
from train.config.plan import Plan

MIXTURES = ("ep", "moe_3d")
SIZES = (1, 2, 4, 8)
OTHER_SIZES = (3, 5, 6, 7, 9, 12, 15, 16, 24, 100)
MOST_FIXES = 3  # in turn, each of the first problem that is left


@cache
def config_of(preset):
    model = ["model=moe_tiny"] if preset in MIXTURES else []
    return cli.parse(cli.parser("test", ""), [f"strategy={preset}", *model])[0]


def fixed_ranks(strategy):
    """The product of the fixed degrees of a preset. The number of processes must be a multiple of it."""
    fixed = math.prod(degree for degree in strategy.mesh_axes().values() if degree > 0)
    return fixed * max(getattr(strategy, "ep", None) or 1, 1)  # over dp_shard, which takes the ranks that are left


def mended(plan):
    """The plan after applying the first override of the first problem, repeated until there is no problem."""
    for _ in range(MOST_FIXES):
        if not (problems := validate(plan.config, plan.world_size)):
            break
        overrides = next(problem.overrides for problem in problems if problem.overrides)
        plan = plan.override(" ".join(overrides))
    return plan


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs_where_its_degrees_divide(preset):
    config = config_of(preset)
    for size in SIZES:
        problems = validate(config, size)
        runs = size == 1 if preset == "single" else size % fixed_ranks(config.strategy) == 0
        assert bool(problems) != runs, f"{preset} on {size}: {[*map(str, problems)]}"
        plan = mended(Plan(config, size))
        assert not validate(plan.config, plan.world_size), f"{preset} on {size}"


@pytest.mark.parametrize("preset", PRESETS)
def test_other_numbers_of_processes_run_or_have_a_fix_that_works(preset):
    config = config_of(preset)
    for size in OTHER_SIZES:
        problems = validate(config, size)
        plan = mended(Plan(config, size))
        assert not validate(plan.config, plan.world_size), f"{preset} on {size}: {[*map(str, problems)]}"
        if len(problems) == 1:
            plan = Plan(config, size).override(" ".join(problems[0].overrides))
            assert not validate(plan.config, plan.world_size), f"{preset} on {size}: {problems[0]}"


def test_the_default_batch_is_1024_tokens_in_microbatches_of_one_sequence():
    train = config_of("single").train
    assert (train.seq_len, train.global_batch_size, train.micro_batch_size) == (128, 8, 1)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_a_stage_for_each_layer(schedule):
    """`tiny` has 8 layers, so at most 8 stages. Schedules with two stages per rank need at most 4 ranks."""
    plan = Plan(config_of("pp"), 8).override(f"strategy.schedule={schedule}")
    assert validate(plan.config, plan.world_size) == []


@pytest.mark.parametrize(
    "schedule", ["interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv_zero_bubble", "dualpipev"]
)
def test_two_stages_a_rank(schedule):
    config = Plan(config_of("pp"), 4).override(f"strategy.schedule={schedule}").config
    assert validate(config, 4) == []
    problems = validate(config, 8)
    assert "model.num_layers=8 is fewer than strategy.pp=8 x 2 stages per rank" in str(problems[0])
    plan = mended(Plan(config, 8))
    assert validate(plan.config, plan.world_size) == []
