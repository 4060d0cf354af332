"""The planner: its cost model on plans of the lab, and how it is scored on published runs."""

import dataclasses
import math
from pathlib import Path

import pytest

from scripts.scoring.jobs import job_of, layers
from scripts.scoring.rows import read
from scripts.scoring.scores import NOT_PREDICTED, Scored, choices, interval
from tests.plans import plan_of
from train.command.planning import constants
from train.command.planning.intervals import SPREAD
from train.command.planning.job import missing_figures, of_plan
from train.command.planning.links import Group, group_of, network
from train.command.planning.quantities import quantities
from train.command.planning.step_time import layer_time, step_time
from train.config.problems import BadInput

RUNS = Path(__file__).resolve().parent.parent / "docs" / "data" / "published_runs.csv"
BASE = "model=llama_8b hardware=h100_sxm precision=bf16 train.seq_len=4096 train.global_batch_size=64"


def predicted(line):
    return step_time(quantities(of_plan(plan_of(f"{BASE} {line}"))), constants.load())


@pytest.fixture(scope="module")
def rows():
    return read(RUNS)


def test_how_many_rows_are_scored(rows):
    speeds = [row for row in rows if row.tokens_per_s]
    promised = [row for row in speeds if row.in_bar]
    assert (len(rows), len(speeds), len(promised)) == (861, 847, 606)
    assert sum(row.regimes[0] == SPREAD for row in promised) == 347
    assert all(job_of(row) is not None for row in speeds[::20])


def test_no_measured_cell_decides_what_is_predicted(rows):
    for row in rows[::150]:
        cells = {name: "" if "measured" in name or "derived" in name else text for name, text in row.cells.items()}
        named = {"source": "x", "row_id": "x", "notes": "x", "model_name": "x"}
        assert job_of(dataclasses.replace(row, cells=cells | named)) == job_of(row)


def test_other_columns_are_refused(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text("gpu,n_gpus\nH100,8\n")
    with pytest.raises(BadInput, match="no column n_layers"):
        read(path)


def test_layers_of_stages():
    assert layers(80, 16) == [5] * 16
    assert layers(126, 8) == [15, *[16] * 6, 15]
    assert layers(95, 8) == [*[12] * 7, 11]
    assert sum(layers(61, 7)) == 61


@pytest.mark.parametrize(
    "line",
    ["strategy=single nproc=1", "strategy=fsdp nproc=8", "strategy=tp nproc=8", "strategy=tp_pp nproc=16 strategy.tp=8",
     "strategy=fsdp_cp nproc=16", "strategy=zero1 nproc=64"],
)  # fmt: skip
def test_products_stay_below_the_measured_peak(line):
    q = quantities(of_plan(plan_of(f"{BASE} {line}")))
    forward, backward = layer_time(q, constants.load())
    flops = 2 * (q.work.forward.volume + q.work.backward.volume)
    assert flops / (forward.products + backward.products) < 794.5e12
    assert all(value >= 0 for value in step_time(q, constants.load()).exposed.values())


def test_what_makes_a_step_longer():
    alone = predicted("strategy=fsdp nproc=8")
    assert predicted("strategy=fsdp nproc=8 train.activation_checkpointing=full").compute > 1.2 * alone.compute
    slow = predicted("strategy=fsdp nproc=64 hardware.node_gb_per_s=10")
    assert slow.exposed["dp"] > 3 * predicted("strategy=fsdp nproc=64").exposed["dp"]
    assert predicted("strategy=tp_pp nproc=16 strategy.tp=8 train.micro_batch_size=8").bubble > 0


def test_time_of_a_collective():
    plan = plan_of(f"{BASE} strategy=fsdp_tp nproc=64 strategy.tp=4")
    assert group_of(plan, "tp") == Group(4, 4)
    assert group_of(plan, "dp_shard") == Group(16, 2)
    net = network(plan.config.hardware, constants.load())
    inside = net.seconds("all_gather", 0, 10**9, Group(8, 8))
    assert inside == pytest.approx(7 / 8 * 1e9 / net.link)
    assert net.seconds("all_reduce", 0, 10**9, Group(8, 8)) == pytest.approx(2 * inside)
    assert net.seconds("all_gather", 1, 0, Group(16, 8)) > net.seconds("all_gather", 1, 0, Group(8, 8))


def test_missing_figures_are_named():
    job = of_plan(plan_of(BASE.replace("h100_sxm", "l40s") + " strategy=fsdp nproc=8"))
    assert {"link_gb_per_s", "matmul_tflops.bf16"} <= {*missing_figures(job)}
    assert missing_figures(of_plan(plan_of(f"{BASE} strategy=fsdp nproc=8"))) == []


def test_every_constant_has_a_reason_and_a_source():
    for name, entry in constants.stored().items():
        assert {"expected", "spread", "value", "reason", "source"} == entry.keys(), name
        assert abs(math.log(entry["value"] / entry["expected"])) < 3 * entry["spread"], name


def test_regret_and_tau(rows):
    row = next(row for row in rows if row.tokens_per_s)
    speeds = [(100.0, 90.0), (80.0, 95.0), (60.0, 50.0), (79.0, 10.0)]  # measured, predicted
    layouts = [dataclasses.replace(row, cells={**row.cells, "tp": str(i)}) for i in range(4)]
    scored = [Scored(one, None, guess, fact, 1.0) for one, (fact, guess) in zip(layouts, speeds, strict=True)]
    (choice,) = choices(scored)
    assert choice.regret == pytest.approx(0.2)
    assert choice.random_regret == pytest.approx(1 - 79.75 / 100)
    assert choice.tau == pytest.approx((3 - 2) / 5), "80 and 79 are equal within the noise"
    assert scored[0].error == NOT_PREDICTED


def test_each_source_weighs_the_same_in_an_interval():
    assert interval([("a", 0.0)] * 100 + [("b", 1.0)]) == (0.0, 1.0)
    assert interval([]) == (-math.inf, math.inf)
