"""What is known about a plan before it runs: the bubble for its microbatches, groups of equal ranks, and problems
that are fixed together."""

import itertools
import math
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from launch.describe.description import merged
from launch.describe.schedule import listed, picture, replayed, step_bubble
from launch.explain import problems, side_by_side
from launch.sweeping.grid import expand
from tests.plans import plan_of
from train.command import presets
from train.command.validate import completed, find_fixes, validate
from train.config.flops import flops_per_token
from train.config.problems import Problem, problem_lines
from train.config.rule import below
from train.config.shapes import block
from train.strategies.equal_ranks import groups_of_equal_ranks, sending_key
from train.strategies.memory import num_parameters, parameter_shapes, state_bytes
from train.strategies.pipeline.placement import SCHEDULES, layers_per_stage
from train.strategies.pipeline.rules import microbatches
from train.strategies.traffic import unknown_traffic


def line_of(lines, start):
    return next(line.strip() for line in lines if line.strip().startswith(start))


@pytest.mark.parametrize(("batch", "percent"), [(16, "15.8 %"), (32, "8.6 %"), (64, "4.5 %"), (128, "2.3 %")])
def test_the_bubble_is_that_of_the_runs_own_microbatches(batch, percent):
    plan = plan_of(f"strategy=pp nproc=4 train.micro_batch_size=1 train.global_batch_size={batch}")
    lines = picture(plan)
    assert line_of(lines, "bubble").startswith(f"bubble of a step of {batch} microbatch(es)")
    assert line_of(lines, "by the closed form").endswith(percent)
    assert percent in line_of(lines, "replayed, by layers")
    assert step_bubble(plan) == percent.split()[0]
    assert ("drawn for 16 of" in lines[0]) == (batch > 16)


def test_uneven_layers_are_replayed():
    lines = picture(
        plan_of("strategy=pp nproc=4 model.num_layers=5 train.micro_batch_size=2 train.global_batch_size=8")
    )
    assert line_of(lines, "by the closed form").endswith("42.9 %")
    assert line_of(lines, "replayed, by layers").endswith(" 44.4 %  (stages of 2, 1, 1, 1 layers)")
    # by hand: the last stage's head adds 0.15 to 3 for each microbatch, 4 of them to the work and 3 x 0.15 to the step
    with_head = line_of(lines, "replayed, with the head")
    assert with_head.endswith(" 43.7 %  (which takes as long as 0.15 layers)")


def test_schedules_that_are_too_long_are_not_replayed():
    plan = plan_of("strategy=pp nproc=4 train.micro_batch_size=1 train.global_batch_size=1000000 train.eval_batches=1")
    assert "not replayed: 8,000,000 forwards and backwards" in line_of(picture(plan), "not replayed")
    assert step_bubble(plan) == "0.0"
    words = "strategy.schedule=zbv_zero_bubble train.activation_checkpointing=full"
    assert "at most 20,000 are replayed" in (unknown_traffic(plan_of(f"strategy=pp nproc=2 {words}").override(
        "train.global_batch_size=1000000 train.micro_batch_size=1")) or "")  # fmt: skip
    assert listed([*range(1, 30)]) == "1 to 29"


def test_the_split_of_layers_is_the_best_of_all():
    """Tries every number of layers of the last stage, and adds up the cost stage by stage."""
    model = replace(plan_of("strategy=pp nproc=2").config.model)
    for layers, stages, vocabulary in itertools.product((5, 8, 13, 40), (2, 3, 4, 5), (256, 10_000, 200_000)):
        model.num_layers, model.vocab_size = layers, vocabulary

        def cost(counts):
            models: list[Any] = [SimpleNamespace(**vars(model) | {"num_layers": n}) for n in (1, 0)]
            one, none = (flops_per_token(model, 128) for model in models)
            flops = [n * (one - none) for n in counts]
            flops[-1] += none
            return max(flops), sum(x * x for x in flops)

        splits = []
        for last in range(1, layers - stages + 2):
            base, extra = divmod(layers - last, stages - 1)
            splits.append([base + (i < extra) for i in range(stages - 1)] + [last])
        assert cost(layers_per_stage(model, 128, stages)) == min(map(cost, splits))


@pytest.mark.parametrize("model", presets.names("model"))
def test_parameters_are_counted(model):
    plan = plan_of(f"strategy=single model={model}")
    total, active = num_parameters(plan.config.model)
    assert total == sum(map(math.prod, parameter_shapes(plan, 0).values()))
    idle = plan.config.model.num_experts - plan.config.model.top_k
    expert = sum(math.prod(s[1:]) for name, s in block(plan.config.model).items() if ".experts." in name)
    assert active == total - (plan.config.model.num_layers * idle * expert if expert else 0)


UNEVEN = (
    "strategy=fsdp_tp nproc=12 strategy.tp=4 model.vocab_size=259",
    "strategy=fsdp nproc=7 model.vocab_size=300",
    "strategy=hsdp nproc=6 model.vocab_size=259",
    "strategy=tp_pp nproc=8 strategy.tp=4 model.vocab_size=259 model.num_layers=5",
    "strategy=pp nproc=4 strategy.schedule=looped_bfs strategy.stages_per_rank=4 model.num_layers=17",
    "strategy=3d nproc=8 model.tie_embeddings=true model.vocab_size=259",
    "strategy=fsdp_pp nproc=8 strategy.pp=2 strategy.schedule=looped_bfs strategy.stages_per_rank=4",
    "strategy=moe_3d model=moe_tiny nproc=16",
    "strategy=fsdp_cp nproc=8 model.vocab_size=300",
)


@pytest.mark.parametrize("line", UNEVEN)
def test_ranks_of_a_group_hold_and_send_the_same(line):
    """Computes the values of each rank, and compares them with those of the first rank of its group."""
    plan = plan_of(f"{line} train.micro_batch_size=1 train.global_batch_size=84")
    assert unknown_traffic(plan) is None
    seen = []
    rows: dict[object, object] = {}
    for (pp, parts), ranks in groups_of_equal_ranks(plan).items():
        seen += ranks
        for rank in ranks:
            assert state_bytes(plan, rank) == state_bytes(plan, ranks[0])
            sent = merged(plan, rank)
            assert rows.setdefault((sending_key(plan, pp), parts), sent) == sent
    assert sorted(seen) == [*range(plan.world_size)]


def test_several_plans_stand_side_by_side():
    words = ["strategy=dp,zero2,fsdp,pp,ds_zero3", "nproc=4", "train.micro_batch_size=1", "train.global_batch_size=8"]
    points = expand(words)
    plans = [plan_of(" ".join([*point.overrides, f"nproc={point.nproc}"])) for point in points]
    head, columns, *rows = side_by_side(points, plans, [[]] * len(plans))
    assert head.endswith("in the memory of this machine") and columns.split()[:2] == ["degrees", "parameters"]
    cells = {row.split()[0]: row.split() for row in rows}
    assert " ".join(cells["dp"]) == "dp nproc=4 dp_replicate 4 0.00575 0.00575 0.0115 0.0230 0 yes 5.883 -"
    assert cells["pp"][-1] == "27.3" and cells["ds_zero3"][-2:] == ["-", "-"]
    assert float(cells["zero2"][-4]) > float(cells["fsdp"][-4]) and cells["zero2"][4:8] == cells["fsdp"][4:8]
    wrong = [Problem("tp_heads", "seven heads", "use six")]
    assert side_by_side(points[:1], plans[:1], [wrong])[-2:] == ["problems of dp nproc=4", "  seven heads: use six"]


def test_several_rules_are_mended_together():
    plan = plan_of("strategy=tp nproc=7")
    found = validate(plan.config, 7)
    assert {problem.fix for problem in found} == {"use nproc=8, nproc=4 or nproc=2"}
    assert len(found) >= 3 and [*problem_lines(found)][-1].endswith("together: use nproc=8, nproc=4 or nproc=2")
    assert find_fixes(plan_of("strategy=single nproc=1")) == [""]
    assert below(12) == [11, 10, 9, 8, 7, 6, 5, 4, 3, 1] and below(1) == []


def test_what_a_text_asks_for_keeps_the_other_rules(tmp_path):
    text = tmp_path / "text"
    text.write_text("abc" * 167)
    words = f"data=text data.path={text} data.validation_fraction=0.5 train.seq_len=256 model.max_seq_len=256"
    words += " strategy=tp nproc=4"
    plan = plan_of(words)
    (problem,) = problems(plan.config, 4)
    assert problem.rule == "corpus_length" and problem.overrides == ("train.seq_len=248",)  # not 249
    assert "use train.seq_len=248 or less, more data" in str(problem)
    there = plan.override("train.seq_len=248")
    assert not problems(there.config, 4)
    offer = Problem("token_in_vocabulary", "id 2 of 2", "use model.vocab_size=5 or more", ("model.vocab_size=5",))
    assert completed(offer, plan).overrides == ("model.vocab_size=5", "nproc=2")
    assert "model.vocab_size=5 nproc=2 or more" in completed(offer, plan).fix
    nothing = completed(Problem("x", "y", "use model.dim=3", ("model.dim=3",)), plan_of("strategy=single"))
    assert nothing.overrides == () and nothing.fix.endswith("and change the keys that are not supported with it")


def test_numbers_of_microbatches_that_a_schedule_accepts_are_near():
    draw = random.Random(4)
    for _ in range(80):
        p, m = draw.randint(2, 40), draw.randint(2, 5000)
        plan = plan_of_schedule(p, m)
        finding = microbatches(plan)
        accepts = SCHEDULES["interleaved_1f1b"].accepts
        if finding is None:
            assert accepts(m, p, 2 * p)
            continue
        sizes = [int(fix.split("=")[1]) for fix in finding.fixes if fix.startswith("train.global_batch_size=")]
        nearest = min((k for k in range(1, 2 * m + p) if accepts(k, p, 2 * p)), key=lambda k: (abs(k - m), k))
        assert sizes[0] == nearest


SCHEDULED = plan_of("strategy=pp nproc=2 strategy.schedule=interleaved_1f1b train.micro_batch_size=1")


def plan_of_schedule(p, m):
    return SCHEDULED.override(f"nproc={p} train.global_batch_size={m}")


def test_a_replay_of_even_stages_is_the_closed_form():
    plan = plan_of("strategy=ds_pp nproc=4 train.micro_batch_size=1 train.global_batch_size=12")
    assert replayed(plan, 0.0) == pytest.approx(3 / 15)
