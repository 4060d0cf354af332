"""The measured traffic of a step equals its closed form, in calls and bytes. So do the bytes of state of each rank."""

import math

import pytest

from tests.drawn import NATIVE
from tests.rows.base import BASE, BF16, F32, F64, TIED, configured
from tests.running import job, run_jobs
from tests.test_deepspeed import needs_deepspeed
from tests.test_rules import drawn_jobs, none_raises, run_fake
from train.config.plan import Plan
from train.strategies.memory import parameter_shapes

FULL, SELECTIVE = (f"train.activation_checkpointing={mode}" for mode in ("full", "selective"))
MOST_SCALARS = 4  # calls of an operation in a step that send a single number
MOE = ("model=moe_tiny", "model.num_layers=2")
FOUR_STAGES = ("strategy.schedule=interleaved_1f1b", "strategy.stages_per_rank=4", "model.num_layers=8")
CONFIGS = {
    2: [
        ("strategy=dp", F32),
        ("strategy=dp", F32, "strategy.bucket_mb=1"),
        ("strategy=fsdp", F32),
        ("strategy=fsdp", BF16),
        ("strategy=fsdp", F64, TIED),
        ("strategy=fsdp", F32, "strategy.reshard_after_forward=false"),
        ("strategy=zero1", F32),
        ("strategy=zero2", F32),
        ("strategy=tp", F32),
        ("strategy=tp", BF16),
        ("strategy=tp", F32, TIED),
        ("strategy=tp", F32, FULL),
        ("strategy=tp", F32, SELECTIVE),
        ("strategy=tp", F32, "strategy.sequence_parallel=false"),
        ("strategy=tp", F32, "strategy.sequence_parallel=false", FULL),
        ("strategy=tp", F32, "strategy.loss_parallel=false"),
        ("strategy=tp", F32, "train.loss_chunks=3"),
        ("strategy=pp", F32),
        ("strategy=pp", BF16, "strategy.schedule=gpipe"),
        ("strategy=pp", F32, "strategy.schedule=interleaved_1f1b"),
        ("strategy=pp", F32, "strategy.schedule=zbv_zero_bubble"),
        ("strategy=dp", F32, "strategy.comm_hook=fp16"),
        ("strategy=dp", F32, "strategy.comm_hook=powersgd", "strategy.powersgd_start_step=2", "strategy.bucket_mb=1"),
        *(("strategy=cp", BF16, f"strategy.cp_method={method}") for method in ("allgather", "ring", "ulysses")),
        *(("strategy=cp", F32, f"strategy.cp_method={method}", FULL) for method in ("allgather", "ring", "ulysses")),
        ("strategy=cp", F32, "strategy.cp_method=ring", SELECTIVE),
        ("strategy=cp", F32, "strategy.cp_method=allgather", SELECTIVE),
        ("strategy=dp", F32, "strategy.dp_replicate=1", "strategy.cp=2"),
        ("strategy=pp", F32, TIED),
        ("strategy=pp", F32, "optim=sgd"),
        ("strategy=pp", F32, "optim=sgd", "optim.momentum=0.9"),
        *((f"strategy={name}", F32, *MOE) for name in ("dp", "fsdp", "tp", "pp", "cp", "ep")),
        ("strategy=tp", F32, *MOE, "strategy.sequence_parallel=false"),
        ("strategy=ep", BF16, *MOE, "model.balance=aux_loss"),
        ("strategy=ep", F32, *MOE, FULL),
        ("strategy=tp", F32, "model.num_kv_heads=1"),
    ],
    4: [
        ("strategy=fsdp", F32, "model.vocab_size=258", "model.ffn_dim=350"),
        ("strategy=fsdp", F32, "strategy.dp_replicate=2"),
        ("strategy=fsdp_tp", F32),
        ("strategy=fsdp_tp", F32, "strategy.sequence_parallel=false"),
        ("strategy=fsdp_tp", F32, "model.vocab_size=259"),
        ("strategy=tp_pp", F32, "strategy.loss_parallel=false", "model.vocab_size=259"),
        ("strategy=tp_pp", F32),
        ("strategy=dp_pp", F32),
        ("strategy=fsdp_pp", F32),
        ("strategy=fsdp_pp", F32, "strategy.schedule=dualpipev"),
        *(("strategy=cp", F32, f"strategy.cp_method={method}") for method in ("ring", "ulysses")),
        *((f"strategy={name}", F32) for name in ("fsdp_cp", "cp_tp")),
        ("strategy=pp", F32, "strategy.pp=2", "strategy.cp=2"),
        ("strategy=dp", F32, "strategy.cp=2"),
        ("strategy=fsdp_pp", F32, TIED),
        ("strategy=pp", F32, "strategy.pp=2", "strategy.dp_shard=2", "strategy.reshard_after_forward=true"),
        ("strategy=dp_pp", F32, "strategy.schedule=interleaved_1f1b", "strategy.bucket_mb=0.5"),
        ("strategy=fsdp_pp", F32, "strategy.schedule=zbv_zero_bubble", TIED),
        *(("strategy=fsdp_pp", F32, *FOUR_STAGES, f"strategy.reshard_after_forward={x}") for x in ("true", "false")),
        ("strategy=tp_pp", F32, "strategy.schedule=interleaved_zero_bubble", FULL),
        ("strategy=tp_pp", F32, "strategy.schedule=dualpipev", SELECTIVE),
        ("strategy=ep", F32, *MOE, "strategy.ep=2"),
        ("strategy=ep", F32, *MOE, "strategy.ep=2", "strategy.tp=2"),
        ("strategy=ep", F32, *MOE, "strategy.dp_replicate=2"),
        ("strategy=ep", F32, *MOE, "strategy.cp=2"),
        ("strategy=tp", F32, "model.num_kv_heads=2"),
        *(("strategy=fsdp_tp", precision, "model.num_kv_heads=1") for precision in (F32, BF16)),
    ],
    8: [("strategy=3d", F32), ("strategy=moe_3d", F32, *MOE)],
}


def name(size, config):
    return f"{' '.join(config).replace('strategy.', '').replace('strategy=', '')} ws{size}"


def run_ledger(folder, size, configs):
    """The results that ledger_worker.py writes, by name and rank."""
    common = [*BASE, "runtime.device=cpu", "runtime.timeout_s=60", f"train.global_batch_size={max(4, 2 * size)}"]
    jobs = [job(name(size, words), [*common, layers(size, words), *words]) for words in configs]
    return run_jobs(folder, jobs, size=size, timeout_s=120, worker="tests.ledger_worker")


def layers(size, words):
    """One layer for each stage, and at least two."""
    return f"model.num_layers={max(2, Plan(configured([*BASE, *words]), size).num_stages)}"


def quick(configs):
    """The first config of each preset, schedule, method and hook."""
    kinds = ("strategy=", "strategy.schedule=", "strategy.cp_method=", "strategy.comm_hook=")
    first: dict[tuple[str, ...], tuple[str, ...]] = {}
    for config in configs:
        first.setdefault(tuple(word for word in config if word.startswith(kinds)), config)
    return first.values()


NAMES = [
    pytest.param(
        name(size, config),
        id=name(size, config),
        marks=[] if size == 2 and config in quick(configs) else [pytest.mark.slow],
    )
    for size, configs in CONFIGS.items()
    for config in configs
]


@pytest.fixture(scope="module")
def measured(request, tmp_path_factory):
    """Results of the selected configs of a size, in one world."""
    done = {}
    params = [getattr(getattr(item, "callspec", None), "params", {}) for item in request.session.items]
    selected = {found["config"] for found in params if "config" in found}

    def results(wanted):
        size = int(wanted.rpartition("ws")[2])
        if size not in done:
            chosen = [config for config in CONFIGS[size] if name(size, config) in selected]
            done[size] = run_ledger(tmp_path_factory.mktemp("ledger"), size, chosen)
        assert "error" not in done[size][wanted], done[size][wanted]["error"]
        return [done[size][f"{wanted} rank{rank}"] for rank in range(size)]

    return results


@pytest.mark.timeout(600)
@pytest.mark.parametrize("config", NAMES)
def test_a_step_sends_what_it_must(config, measured):
    results = measured(config)
    for rank, result in enumerate(results):
        said = dict(result["expected"])
        for key in result["means"]:
            said[key] = [said[key][0], over_experts_ranks(key, result, results)]
        assert result["measured"] == said, f"rank {rank}"


def over_experts_ranks(key, result, results):
    """The measured bytes that the rank sends. The bytes that it sends back depend on the routing. They must be at least
    the exact part, and their sum over the ranks that share experts must equal the closed form."""
    group = [other for other in results if other["ep_group"] == result["ep_group"]]
    sent, said = (sum(rank[name][key][1] for rank in group) for name in ("measured", "expected"))
    assert sent == said
    assert result["measured"][key][1] >= result["exact"][key][1]
    return result["measured"][key][1]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("config", NAMES)
def test_a_rank_holds_what_is_said(config, measured):
    for rank, result in enumerate(measured(config)):
        assert result["held"] == result["expected_held"], f"rank {rank}"
        assert result["state"] == result["expected_state"], f"rank {rank}"


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_deepspeeds_engines_send_what_is_said(tmp_path):
    """The formulas of docs/deepspeed.md for P float32 parameters in one bucket and m microbatches. Beside them the
    engine sends a few single numbers."""
    plan = Plan(configured([*BASE, F32, "strategy=single"]), 1)
    parameters, hidden = 4 * sum(math.prod(shape) for shape in parameter_shapes(plan, 0).values()), 4 * 16 * 128
    m, groups = 2, 2  # of the optimiser: what decays, and what does not
    wanted = {
        "ds_zero1": {"dp_shard/all_reduce": (1, parameters), "dp_shard/all_gather": (groups, parameters)},
        "ds_zero2": {"dp_shard/all_reduce": (m, m * parameters), "dp_shard/all_gather": (groups, parameters)},
        "ds_zero3": {"dp_shard/all_gather": (m, m * parameters), "dp_shard/reduce_scatter": (m, m * parameters)},
        "ds_pp": {"pp/send": (2 * m, 2 * m * hidden)},
        "ds_autotp": {"tp/all_reduce": (2 * m * 2 * 7, 2 * m * 2 * 7 * hidden)},
    }
    found = run_ledger(tmp_path, 2, [(f"strategy={engine}", F32) for engine in wanted])
    for engine, said in wanted.items():
        config = name(2, (f"strategy={engine}", F32))
        assert "error" not in found[config], found[config]["error"]
        for rank in range(2):
            measured = found[f"{config} rank{rank}"]["measured"]
            assert said.keys() <= measured.keys(), engine
            for key, (calls, size) in measured.items():
                least, least_size = said.get(key, (0, 0))  # beside them, by the same operation, single numbers
                assert 0 <= calls - least <= MOST_SCALARS, f"{engine} rank {rank} {key}: {calls} calls, not {least}"
                assert 0 <= size - least_size <= 16 * MOST_SCALARS, f"{engine} rank {rank} {key}: {size} bytes"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_drawn_configs_send_what_is_said():
    """Tests one rank of two configs of each preset, in worlds of up to 64 ranks, on a fake process group
    (tests/fake_worker.py)."""
    none_raises([job | {"count": True} for job in drawn_jobs()[len(NATIVE) :]])


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_recomputation_under_dropout_runs_every_exit_again():
    """The backward needs the mask of the last dropout, after the result of the last product is summed over tp."""
    small = ("model.dim=48", "model.num_layers=2", "model.num_heads=4", "model.num_kv_heads=4", "train.seq_len=32")
    lines = [
        ("strategy=fsdp_tp", *small, "model.dropout=0.1", FULL, f"strategy.sequence_parallel={sp}", *more)
        for sp in ("true", "false")
        for more in ((), ("model.num_experts=4", "model.expert_ffn_dim=24"))
    ]
    assert run_fake([{"overrides": [*line], "world_size": 4, "rank": 1, "count": True} for line in lines]) == []
