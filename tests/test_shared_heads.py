"""Fewer KV heads than ranks of tp: several ranks hold the same head. That the gradient is right is a row of the
equivalence table (tests/rows/tensor.py); here, that the ranks stay equal, what AutoTP makes of it, and the rules."""

from typing import Any

import pytest

from tests.rows.base import BASE, F32, row
from tests.running import job, run_jobs, run_rows
from tests.test_deepspeed import needs_deepspeed
from tests.test_equivalence import assert_green
from tests.test_rules import run_fake
from train.command import cli
from train.command.validate import validate
from train.config.plan import Plan
from train.config.schema import Config
from train.strategies.memory import parameter_shapes

ONE, TWO = "model.num_kv_heads=1", "model.num_kv_heads=2"
RUNTIME = ["runtime.device=cpu", "runtime.timeout_s=60"]


def parse(*words: str) -> Config:
    return cli.parse(cli.parser("test", ""), list(words))[0]


@pytest.mark.parametrize(
    ("words", "size", "heads"),
    [(("strategy=tp",), 2, 2), (("strategy=tp",), 8, 1), (("strategy=tp", ONE), 4, 1), (("strategy=tp_pp", TWO), 8, 1)],
)
def test_a_rank_holds_whole_kv_heads(words, size, heads):
    """`heads` heads, each with 16 rows of 128 elements."""
    plan = Plan(parse(*words), size)
    assert validate(plan.config, size) == []
    for rank in range(size):
        shapes = {
            shape for name, shape in parameter_shapes(plan, rank).items() if name.endswith(("wk.weight", "wv.weight"))
        }
        assert shapes == {(16 * heads, 128)}


@pytest.mark.parametrize(
    ("words", "size", "says", "fix"),
    [
        (("strategy=tp", "model.num_heads=12", "model.dim=96", "model.num_kv_heads=6"), 4,
         "model.num_kv_heads=6 and strategy.tp=4: neither divides the other", "nproc=2"),
        (("strategy=tp",), 16, "model.num_heads=8 is not divisible by strategy.tp=16", "nproc=8"),
        (("strategy=cp_tp", "strategy.cp_method=ulysses"), 8,
         "model.num_kv_heads=4 / strategy.tp=4 is not divisible by strategy.cp=2", "strategy.cp_method=ring"),
        (("strategy=cp_tp", "strategy.cp_method=ulysses", TWO), 8,
         "model.num_kv_heads=2 / strategy.tp=4 is not divisible by strategy.cp=2", "strategy.cp_method=ring"),
    ],
)  # fmt: skip
def test_what_cannot_be_shared_evenly_is_refused_with_a_fix(words, size, says, fix):
    (problem,) = validate(parse(*words), size)
    assert says in problem.message and fix in problem.fix
    plan = Plan(parse(*words), size).override(" ".join(problem.overrides))
    assert validate(plan.config, plan.world_size) == []


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_ranks_that_share_a_head_stay_equal(tmp_path):
    """Weights and both moments of AdamW, bitwise, after three steps: wk and wv of 4 layers on 4 ranks."""
    configs = [("strategy=tp", TWO), ("strategy=fsdp_tp", ONE), ("strategy=tp_pp", ONE)]
    jobs = [job(" ".join(words), [*BASE, "model.num_layers=4", F32, *RUNTIME, *words]) for words in configs]
    found = run_jobs(tmp_path, jobs, size=4, timeout_s=100, worker="tests.shared_heads_worker")
    stages = {"strategy=tp_pp": 2}
    for one, (strategy, _) in zip(jobs, configs, strict=True):
        result = found[one.name]
        assert "error" not in result, result["error"]
        assert result["compared"] == 4 * 4 * 2 * 3 // stages.get(strategy, 1)
        assert result["unequal"] == 0, one.name


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_autotp_equals_one_device(tmp_path):
    """DeepSpeed would split a head, so the lab makes it keep wk and wv unsharded."""
    full = "train.activation_checkpointing=full"
    rows = [
        row(2, "strategy=ds_autotp", options=(F32, ONE)),
        row(2, "strategy=ds_autotp", "strategy.zero_stage=3", options=(F32, ONE, "model.tie_embeddings=true", full)),
    ]
    results = run_rows(tmp_path, rows)
    for one in rows:
        assert_green(results[one.name])


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_products_send_and_hold_what_is_said():
    """Tests one rank of each config on a fake process group (tests/fake_worker.py)."""
    configs: list[tuple[Any, ...]] = [
        (8, "strategy=3d", ONE, "precision=bf16"),
        (8, "strategy=fsdp_tp", "strategy.dp_replicate=2", ONE, F32),
        (8, "strategy=tp_pp", TWO, F32, "strategy.schedule=interleaved_1f1b", "model.num_layers=8"),
        (8, "strategy=cp_tp", TWO, F32, "strategy.cp_method=ring", "train.activation_checkpointing=full"),
        (4, "strategy=fsdp_tp", ONE, "precision=bf16", "strategy.zero_stage=1"),
        (8, "strategy=moe_3d", "model=moe_tiny", "model.num_layers=2", ONE, F32),
    ]
    jobs = [
        {"overrides": [*BASE, "runtime.device=cpu", *words], "world_size": size, "rank": size - 1, "count": True}
        for size, *words in configs
    ]
    failures = run_fake(jobs)
    assert not failures, failures
