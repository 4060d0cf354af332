"""The closed form of memory: against dry runs, torch's schedules, the closed forms of state, and published peaks."""

import dataclasses
from pathlib import Path

import pytest

from scripts.scoring import memory
from scripts.scoring.largest_batch import largest_batch
from scripts.scoring.rows import read
from tests.drawn import Drawn
from tests.footprints import compared, dry_runs, fullest, layouts
from tests.plans import plan_of
from train.command.planning.footprint import candidates, footprint, of_rank, outside, reserve
from train.command.planning.job import of_plan
from train.command.planning.memory.orders import order
from train.command.planning.memory.stages import stage_of
from train.command.planning.memory.state import between_steps, parameters_of
from train.config.problems import BadInput
from train.config.shapes import coordinates
from train.strategies.memory import GiB, needs, state_bytes
from train.strategies.pipeline.placement import SCHEDULES
from train.strategies.pipeline.timetable import actions_by_rank
from train.strategies.techniques import rank_of

RUNS = Path(__file__).resolve().parent.parent / "docs" / "data" / "published_runs.csv"
NUMBER = 10  # layouts that run here; tests/many_footprints.py runs hundreds
BASE = "model=llama_1b hardware=h100_sxm precision=bf16 train.seq_len=4096 model.max_seq_len=4096"
ONE = f"{BASE} strategy=single nproc=1 train.micro_batch_size=4 train.global_batch_size=8"


def said(line):
    return footprint(of_plan(plan_of(line)))


def shortest(one: Drawn) -> Drawn:
    """With two microbatches where there is no pipeline, whose memory is that of more of them: the second one has the
    gradients of the first beside it."""
    if one.plan.degrees["pp"] > 1 or one.plan.num_microbatches <= 2:
        return one
    words = [word for word in one.overrides if not word.startswith("train.global_batch_size=")]
    batch = 2 * one.plan.data_ranks * one.plan.config.train.micro_batch_size
    return Drawn((*words, f"train.global_batch_size={batch}"), one.world_size)


@pytest.mark.timeout(300)
def test_the_closed_form_is_what_a_dry_run_counts():
    drawn = [*map(shortest, layouts(NUMBER))]
    jobs = [(one, fullest(one)) for one in drawn]
    for (one, rank), result in zip(jobs, dry_runs(jobs, timeout_s=280), strict=True):
        assert "error" not in result, result["error"]
        found = compared(one, rank, result["kinds"])
        assert abs(found.error) < 0.03, (one, found)
        assert abs(found.worst_kind[0]) < 0.03, (one, found)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_orders_are_those_of_torch(schedule):
    facts = SCHEDULES[schedule]
    chunks = [facts.least] if facts.most == facts.least else [facts.least, *([3] if facts.most is None else [])]
    for p, v, m in ((p, v, m) for p in (1, 2, 4) for v in chunks for m in (1, 2, 4, 8, 12, 16)):
        if not facts.accepts(m, p, p * v):
            continue
        for rank, row in enumerate(actions_by_rank(schedule, p * v, p, m)):
            theirs, ours = highest([(one.kind, one.stage) for one in row]), highest(order(schedule, p, v, m, rank))
            assert ours == theirs, (p, v, m, rank)


def highest(actions):
    """The most microbatches of each stage that wait for a backward, and for its second half, at once, and both sums."""
    alive: dict[int, int] = {}
    split: dict[int, int] = {}
    most = set()
    for kind, stage in actions:
        if kind == "F":
            alive[stage] = alive.get(stage, 0) + 1
        elif kind in "BI":
            alive[stage] -= 1
            split[stage] = split.get(stage, 0) + (kind == "I")
        else:
            split[stage] -= 1
        most.add((sum(alive.values()), sum(split.values())))
    stages = len(alive)
    return max(most), max(most, key=lambda pair: pair[::-1]), stages


@pytest.mark.parametrize(
    "line",
    ["strategy=fsdp nproc=8", "strategy=3d nproc=16", "strategy=tp_pp nproc=8", "strategy=dp nproc=2",
     "strategy=4d nproc=16 model.tie_embeddings=true", "strategy=fsdp_pp nproc=8 strategy.schedule=zbv_zero_bubble"],
)  # fmt: skip
def test_what_stays_is_what_the_state_says(line):
    plan = plan_of(f"{BASE} {line} train.micro_batch_size=1 train.global_batch_size=64")
    for rank in candidates(plan):
        here = rank_of(plan, rank)
        own = plan.config.strategy.stages_of(coordinates(plan, rank)["pp"], plan.degrees["pp"])
        held = between_steps(here, {stage: stage_of(here, stage) for stage in own})
        assert {kind: held[kind] for kind in state_bytes(plan, rank)} == state_bytes(plan, rank)
        assert parameters_of(here)[0] == held["parameters"]


def test_deepspeeds_state_is_zeros_arithmetic():
    for stage in (1, 2, 3):
        plan = plan_of(f"{BASE} strategy=ds_zero{stage} nproc=8 train.global_batch_size=16")
        kinds, zero = of_rank(of_plan(plan), 0).kinds, needs(plan, 0)
        assert [kinds[name] for name in ("parameters", "optimiser")] == [zero.parameters, zero.optimiser]
        assert kinds["activations"] > 0


def test_what_makes_a_footprint_smaller():
    eager, whole = said(ONE), said(f"{ONE} train.activation_checkpointing=full")
    selective = said(f"{ONE} train.activation_checkpointing=selective")
    assert whole.total < selective.total < eager.total
    assert whole.kinds["activations"] < 0.1 * eager.kinds["activations"]
    compiled = said(f"{ONE} compile.enabled=true")
    assert compiled.kinds["logits"] < 0.5 * eager.kinds["logits"]
    # the same point of docs/results-h100.md, where the allocator had 32.2 GiB at the most
    assert compiled.total == pytest.approx(32.2 * GiB, rel=0.05)


@pytest.mark.parametrize(
    ("line", "gib"),
    [("strategy=dp", 35.6), ("strategy=fsdp", 24.2), ("strategy=tp", 17.7), ("strategy=pp", 26.7),
     ("strategy=pp strategy.schedule=interleaved_1f1b", 32.5)],
)  # fmt: skip
def test_peaks_of_two_gpus(line, gib):
    """The points of docs/results-h100.md, compiled; its peaks are those of the allocator."""
    batch = "nproc=2 compile.enabled=true train.micro_batch_size=4 train.global_batch_size=16"
    assert said(f"{BASE} {batch} {line}").total == pytest.approx(gib * GiB, rel=0.05)


@pytest.mark.parametrize(
    ("line", "rows", "gib"),
    [
        ("none", 16, 81.1), ("selective", 16, 60.7), ("full", 16, 22.6), ("full train.seq_len=32768", 1, 16.4),
        ("none train.loss_chunks=8", 16, 74.61), ("full train.loss_chunks=8", 8, 16.02),
        ("full train.loss_chunks=8 train.seq_len=32768", 2, 20.21),
    ],
)  # fmt: skip
def test_peaks_of_recomputation(line, rows, gib):
    """Points of docs/benchmarks.md on one GPU, compiled, one microbatch a step."""
    batch = f"nproc=1 compile.enabled=true train.micro_batch_size={rows} train.global_batch_size={rows}"
    peak = said(f"{BASE} {batch} strategy=single train.activation_checkpointing={line}").total
    assert peak == pytest.approx(gib * GiB, rel=0.01)


def test_what_a_device_holds_beside_tensors():
    job = of_plan(plan_of(f"{BASE} strategy=3d nproc=8 train.global_batch_size=64"))
    assert outside(job) == pytest.approx((0.6 + 3 * 0.5) * GiB)
    assert reserve(job) == pytest.approx(outside(job) + 0.03 * 79.65 * GiB)
    unknown = dataclasses.replace(job, plan=plan_of("strategy=single nproc=1"))
    assert reserve(unknown) == 0


def test_the_largest_micro_batch_is_the_last_that_fits():
    words = [*BASE.replace("train.seq_len=4096", "train.seq_len=8192").split(), "strategy=single"]
    most = largest_batch(words)
    job = of_plan(plan_of(" ".join([*words, "nproc=1"])))
    memory_gib = job.plan.config.hardware.memory_gib
    assert memory_gib is not None
    free = memory_gib * GiB - reserve(job)
    for rows in (most, most + 1):
        line = " ".join([*words, "nproc=1", f"train.micro_batch_size={rows}", f"train.global_batch_size={rows}"])
        assert (said(line).total <= free) == (rows == most)
    assert largest_batch(["hardware=h100_sxm", "model=llama_70b", "strategy=single"]) == 0
    with pytest.raises(BadInput, match="memory_gib is not known"):
        largest_batch(["model=tiny", "strategy=single"])


def test_published_peaks_are_labelled_and_not_read():
    rows = [row for row in read(RUNS) if row.peak_gib]
    kinds = [memory.kind_of(row) for row in rows]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        memory.ALLOCATED: 2, memory.RESERVED: 12, memory.WHOLE: 61, memory.UNKNOWN: 83
    }  # fmt: skip
    for row in rows[::40]:
        blank = {name: "" if "measured" in name or "derived" in name else text for name, text in row.cells.items()}
        other = dataclasses.replace(row, cells=blank | dict.fromkeys(("notes", "source", "row_id", "model_name"), "x"))
        job = memory.job_of(row)
        assert job is not None
        assert memory.predicted(job, row, memory.WHOLE) == memory.predicted(job, other, memory.WHOLE)
