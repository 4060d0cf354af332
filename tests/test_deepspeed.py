"""DeepSpeed's engines equal one device, print little, have the state that ZeRO describes, and are optional."""

import importlib.util
import subprocess
import sys

import pytest

from tests.rows.base import BASE, F32, Row
from tests.rows.deepspeed import ROWS, SLOW_ROWS
from tests.running import job, run_jobs, run_rows
from tests.test_equivalence import assert_green, assert_red, names
from tests.test_run import MiB, held_by_rank, launch, steps_of
from train.command import cli
from train.command.validate import validate
from train.config.problems import EXIT_ENVIRONMENT, BadInput

KINDS = ("parameters", "gradients", "optimiser")
SHARDS = {1: (1, 1, 2), 2: (1, 2, 2), 3: (2, 2, 2)}  # by ZeRO's stage: of each kind, over two ranks
INSTALLED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not INSTALLED, reason='pip install "strategy-lab[deepspeed]"')


@pytest.fixture(scope="module")
def table(request, tmp_path_factory):
    """Results of the selected rows of a size, in one world for each size, apart from other strategies."""
    done = {}
    selected = {item.callspec.params["row"] for item in request.session.items if item.module is request.module
                and "row" in getattr(getattr(item, "callspec", None), "params", {})}  # fmt: skip

    def results(row: Row, rows):
        key = (row.size, rows is SLOW_ROWS)
        if key not in done:
            chosen = [other for other in rows if other.size == row.size and other in selected]
            done[key] = run_rows(tmp_path_factory.mktemp(f"deepspeed_{row.size}"), chosen)
        return done[key][row.name]

    return results


@needs_deepspeed
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("row", [row for row in ROWS if not row.bug], ids=names)
def test_engine_equals_one_device(row, table):
    assert_green(table(row, ROWS))


@needs_deepspeed
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("row", [row for row in ROWS if row.bug], ids=names)
def test_planted_bug_turns_the_row_red(row, table, record_property):
    assert_red(row, table(row, ROWS), record_property)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("row", SLOW_ROWS, ids=names)
def test_more_engines_equal_one_device(row, table):
    assert_green(table(row, SLOW_ROWS))


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.timeout(200)
def test_each_stage_shards_one_thing_more(tmp_path):
    """Rajbhandari et al. 2020, figure 1, without the mixed precision: parameters, gradients, optimiser state."""
    words = [F32, "train.seq_len=16", "train.micro_batch_size=1", "runtime.device=cpu"]
    jobs = [job(f"CHECK:held {stage}", [*words, f"strategy=ds_zero{stage}"]) for stage in SHARDS]
    found = run_jobs(tmp_path, jobs, size=2, timeout_s=150)
    for one, stage in zip(jobs, SHARDS, strict=True):
        assert "error" not in found[one.name], found[one.name]["error"]
        are_shards(found[one.name]["held"], stage)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_run_logs_the_shards_and_prints_nothing_of_the_engine(tmp_path):
    steps = ("train.steps=2", "train.seq_len=16", "train.eval_batches=1")
    out, path = launch(tmp_path, 2, "strategy=ds_zero3", *steps)
    assert "DeepSpeed" not in out and "deepspeed" not in out and "Warning" not in out
    step = steps_of(path)[0][-1]
    are_shards([{kind: step[f"memory_by_rank/{kind}_mib/rank_{rank}"] * MiB for kind in KINDS} for rank in (0, 1)], 3)


def are_shards(held, stage: int) -> None:
    whole = held_by_rank("dp", 1)[0]
    totals = (whole, whole, 3 * whole)  # two moments, and the copy of its part of the weights that a rank updates
    # partitions are padded, and stage 2 may hold the whole gradient of a parameter that its bounds cut
    padding = 4096, 4 * 352 * 128, 4096
    for found in held:
        for kind, total, parts, spare in zip(KINDS, totals, SHARDS[stage], padding, strict=True):
            assert abs(found[kind] - total / parts) <= spare, kind


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.timeout(200)
def test_autotp_sends_what_is_said_and_replicas_stay_equal(tmp_path):
    per_layer = {"none": 7, "full": 9}  # by kind of recomputation
    words = [*BASE, "strategy=ds_autotp", F32, "model.dropout=0.1", "runtime.device=cpu", "runtime.timeout_s=60"]
    jobs = {kind: job(f"CHECK:autotp {kind}", [*words, f"train.activation_checkpointing={kind}"]) for kind in per_layer}
    found = run_jobs(tmp_path, [*jobs.values()], size=2, timeout_s=150)
    for kind, one in jobs.items():
        result = found[one.name]
        assert "error" not in result, result["error"]
        calls = 2 * 8 * per_layer[kind]  # layers, microbatches of one row of 16 tokens, 128 wide, float32
        assert result["sent"] == {"tp/all_reduce": [calls + 2, calls * 16 * 128 * 4 + 8]}  # and the norm, and overflow
        assert result["drift"] == 0.0
        assert result["cut"] == 2 * 7


@needs_deepspeed
@pytest.mark.timeout(200)
def test_dropout_is_for_training_alone(tmp_path):
    engines = ["ds_zero1", "ds_pp", "ds_autotp"]
    jobs = [job(f"CHECK:evaluation {name}", [*BASE, F32, "model.dropout=0.5", f"strategy={name}"]) for name in engines]
    found = run_jobs(tmp_path, jobs, size=2, timeout_s=100)
    for name, result in found.items():
        assert "error" not in result, result["error"]
        (first, second), (one, other) = result["trained"], result["evaluated"]
        assert one == other and abs(first - second) > 1e-3, name


@pytest.mark.parametrize("name", ["ds_zero1", "ds_pp", "ds_autotp"])
def test_missing_package_is_one_line(name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = cli.parse(cli.parser("test", ""), [f"strategy={name}"])[0]
    with pytest.raises(BadInput) as caught:
        cli.check(config, 2)
    assert caught.value.exit_code == EXIT_ENVIRONMENT
    assert str(caught.value) == (
        f'strategy={name} needs deepspeed, which is not installed: pip install "strategy-lab[deepspeed]"'
    )


@pytest.mark.parametrize(
    ("overrides", "world_size"),
    [
        (("strategy=ds_zero1", "precision=float64"), 2),
        (("strategy=ds_zero1", "strategy.zero_stage=0"), 2),
        (("strategy=ds_zero3", "strategy.zero_stage=4"), 2),
        (("strategy=ds_zero3", "strategy.dp_shard=null"), 1),
        (("strategy=ds_zero3", "strategy.dp_shard=null", "strategy.dp_replicate=2"), 2),
        (("strategy=ds_zero3", "strategy.dp_shard=2", "strategy.dp_replicate=2"), 4),
        (("strategy=ds_zero1", "strategy.bucket_mb=0"), 2),
        (("strategy=ds_zero3", "strategy.whole_below=-1"), 2),
        (("strategy=ds_pp", "strategy.zero_stage=3"), 2),
        (("strategy=ds_pp", "strategy.pp=2", "strategy.dp_shard=2"), 4),
        (("strategy=ds_pp", "strategy.offload_optimizer=true"), 2),
        (("strategy=ds_pp", "model.tie_embeddings=true"), 2),
        (("strategy=ds_pp", "model.num_layers=2"), 4),
        (("strategy=ds_autotp", "precision=bf16"), 2),
        (("strategy=ds_autotp", "precision=float64"), 2),
        (("strategy=ds_autotp", "train.activation_checkpointing=selective"), 2),
        (("strategy=ds_autotp", "compile.enabled=true"), 2),
        (("strategy=ds_autotp", "strategy.zero_stage=0"), 2),
        (("strategy=ds_autotp", "strategy.tp=2", "strategy.dp_replicate=2"), 4),
        (("strategy=ds_autotp", "strategy.pp=2"), 4),
        (("strategy=ds_pp", "strategy.tp=2"), 4),
        (("strategy=ds_autotp",), 16),
        (("strategy=ds_autotp", "model.ffn_dim=350"), 4),
    ],
)
def test_a_fix_mends_its_problem(overrides, world_size):
    def parse(*words):
        return cli.parse(cli.parser("test", ""), list(words))[0]

    problems = validate(parse(*overrides), world_size)
    assert len(problems) == 1, problems
    assert problems[0].overrides, f"{problems[0]} offers no override"
    keys = [word for word in problems[0].overrides if not word.startswith("nproc=")]
    size = int(next((word[6:] for word in problems[0].overrides if word.startswith("nproc=")), world_size))
    assert validate(parse(*overrides, *keys), size) == []


def test_no_other_strategy_imports_it():
    code = "import sys, train.main, train.strategies.apply, train.step, train.strategies.pipeline.stages"
    code += "; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "deepspeed" not in out.split()
