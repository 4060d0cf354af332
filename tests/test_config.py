"""Presets, schema and rules."""

import math

import pytest
import yaml

from train.command import cli, presets
from train.command.resources import CONFIG_DIR
from train.command.validate import validate
from train.config.problems import BadInput
from train.config.schema import LrSchedule
from train.config.strategy import MESH_AXES, resolve_degrees
from train.ranks.optim import lr_at
from train.strategies.pipeline.placement import layers_of_stages, layers_per_stage

STRATEGIES = presets.names("strategy")
WORLD = {"single": 1, "3d": 8, "4d": 16, "moe_3d": 8}
MODEL = {"ep": "moe_tiny", "moe_3d": "moe_tiny"}


def parse(*overrides):
    return cli.parse(cli.parser("test", ""), list(overrides))[0]


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategy_preset(name):
    config = parse(f"strategy={name}", f"model={MODEL.get(name, 'tiny')}")
    assert config.strategy.name == name
    assert validate(config, WORLD.get(name, 4)) == []
    degrees = resolve_degrees(config.strategy.mesh_axes(), WORLD.get(name, 4))
    assert tuple(degrees) == MESH_AXES
    assert math.prod(degrees.values()) == WORLD.get(name, 4)


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategy_is_in_the_readme(name):
    readme = (CONFIG_DIR.parent / "README.md").read_text()
    assert f"| `{name}` |" in readme


def test_hardware_figures_have_a_source():
    for path in (CONFIG_DIR / "hardware").glob("*.yaml"):
        values = yaml.safe_load(path.read_text())
        figures = values.keys() - {"defaults", "name", "match", "source"}
        assert values["name"] == path.stem
        assert all(values.get("source", {}).get(name) for name in figures), path.stem
        assert values.get("source", {}).keys() <= figures, "a source of nothing"
        if path.stem not in ("auto", "cpu_default"):
            assert values["match"] and values["peak_tflops"]["bf16"] > 0


def test_defaults():
    config = parse()
    train = config.train
    assert (train.seq_len, train.global_batch_size, train.micro_batch_size, train.steps) == (128, 8, 1, 100)
    assert (config.optim.name.value, config.optim.lr, config.model.name) == ("adamw", 1e-3, "tiny")
    assert config.model.max_seq_len == 128
    assert parse("train.seq_len=64").model.max_seq_len == 64


def test_degrees_fill_with_the_ranks_that_are_left():
    assert resolve_degrees({"dp_shard": -1, "tp": 2}, 8)["dp_shard"] == 4
    assert resolve_degrees({}, 8) == dict.fromkeys(MESH_AXES, 1)


def test_all_problems_come_at_once():
    config = parse("strategy=tp_pp", "strategy.tp=3", "train.global_batch_size=7", "train.micro_batch_size=2")
    found = {problem.rule for problem in validate(config, 4)}
    assert found == {
        "world_size", "tp_heads", "tp_kv_heads", "tp_ffn", "tp_sequence", "batch_splits"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "world_size"),
    [
        (("strategy=dp",), 3),
        (("strategy=single",), 4),
        (("strategy=pp", "model.num_layers=2"), 4),
        (("strategy=pp", "train.micro_batch_size=4"), 4),
        (("strategy=pp", "strategy.schedule=zigzag"), 2),
        (("strategy=pp", "strategy.pp=null"), 1),
        (("strategy=pp", "strategy.stages_per_rank=2"), 2),
        (("strategy=pp", "strategy.stages_per_rank=0", "strategy.layers_per_stage=[8]"), 1),
        (("strategy=pp", "strategy.schedule=dualpipev", "strategy.stages_per_rank=3"), 2),
        (("strategy=pp", "strategy.schedule=looped_bfs", "strategy.stages_per_rank=1"), 2),
        (("strategy=pp", "strategy.schedule=looped_bfs", "model.num_layers=7"), 4),
        (("strategy=pp", "strategy.layers_per_stage=[5,4]"), 2),
        (("strategy=pp", "strategy.layers_per_stage=[8,0]"), 2),
        (("strategy=pp", "strategy.layers_per_stage=[3,3,2]"), 2),
        (("strategy=pp", "strategy.layers_per_stage=[3,3,2]", "strategy.schedule=zbv_zero_bubble"), 2),
        (("strategy=pp", "strategy.schedule=dualpipev", "train.global_batch_size=3"), 2),
        (("strategy=pp", "strategy.schedule=interleaved_1f1b", "train.global_batch_size=5"), 2),
        (("strategy=pp", "strategy.schedule=zbv_zero_bubble", "compile.enabled=true"), 2),
        (("strategy=dp_pp", "strategy.schedule=interleaved_zero_bubble"), 4),
        (("strategy=fsdp_pp", "strategy.schedule=looped_bfs", "strategy.reshard_after_forward=true"), 4),
        (("strategy=dp", "strategy.tp=2"), 4),
        (("strategy=dp", "strategy.comm_hook=gzip"), 2),
        (("strategy=fsdp", "strategy.comm_hook=fp16"), 2),
        (("strategy=dp", "strategy.cpu_offload=true"), 2),
        (("strategy=tp", "strategy.zero_stage=1"), 2),
        (("strategy=fsdp_pp", "strategy.zero_stage=3"), 4),
        (("strategy=fsdp", "strategy.zero_stage=7"), 2),
        (("strategy=dp", "strategy.bucket_mb=0"), 2),
        (("strategy=dp", "strategy.powersgd_start_step=1"), 2),
        (("strategy=tp", "train.seq_len=256", "model.max_seq_len=128"), 4),
        (("strategy=cp", "strategy.cp_method=zigzag"), 4),
        (("strategy=cp", "train.seq_len=100"), 4),
        (("strategy=cp", "train.seq_len=101"), 1),
        (("strategy=cp_tp", "strategy.tp=4", "train.seq_len=4"), 8),
        (("strategy=cp_tp", "strategy.tp=4", "train.seq_len=68"), 8),
        (("strategy=cp", "strategy.cp_method=ulysses"), 8),
        (("strategy=cp_tp", "strategy.cp_method=ulysses"), 8),
        (("strategy=dp", "strategy.cp=2", "strategy.tp=2"), 4),
        (("strategy=tp", "data.ignore_token=300"), 4),
        (("strategy=tp", "optim.min_lr_ratio=2"), 4),
        (("strategy=ep", "model=moe_tiny", "strategy.ep=3"), 4),
        (("strategy=ep", "model=moe_tiny", "strategy.ep=0"), 4),
        (("strategy=ep", "model=moe_tiny", "model.num_experts=6"), 4),
        (("strategy=ep", "model=moe_tiny", "strategy.ep=1", "model.dim=144", "model.num_heads=8"), 32),
        (("strategy=ep", "model=moe_tiny", "train.activation_checkpointing=selective"), 4),
        (("strategy=dp", "model=moe_tiny", "strategy.ep=2"), 4),
        (("strategy=dp", "model=moe_tiny", "model.top_k=9"), 4),
        (("strategy=dp", "model=moe_tiny", "model.expert_ffn_dim=0"), 4),
        (("strategy=dp", "model.num_shared_experts=1"), 4),
        (("strategy=tp", "model=moe_tiny", "model.expert_ffn_dim=110"), 4),
    ],
)
def test_a_fix_mends_its_problem(overrides, world_size):
    problems = validate(parse(*overrides), world_size)
    assert problems
    for problem in problems:
        assert problem.overrides, f"{problem} offers no override"
        keys = [word for word in problem.overrides if not word.startswith("nproc=")]
        size = int(next((word[6:] for word in problem.overrides if word.startswith("nproc=")), world_size))
        after = {other.rule for other in validate(parse(*overrides, *keys), size)}
        assert problem.rule not in after
        assert after <= {other.rule for other in problems}


def test_missing_value_is_named():
    with pytest.raises(BadInput, match=r"needs a path"):
        from train.data.corpus import load_corpus

        load_corpus(parse("data=text"))


@pytest.mark.parametrize("schedule", LrSchedule)
def test_learning_rate(schedule):
    config = parse(f"optim.schedule={schedule.value}", "optim.warmup_steps=10", "optim.min_lr_ratio=0.1").optim
    rates = [lr_at(step, 100, config) for step in range(1, 101)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-3 if schedule is LrSchedule.constant else 1e-4)
    assert rates[9:] == sorted(rates[9:], reverse=True)


@pytest.mark.parametrize(("layers", "stages"), [(8, 4), (7, 4), (5, 5), (80, 16), (3, 2), (3, 1)])
@pytest.mark.parametrize("model", ["tiny", "llama_70b"])
def test_stages_hold_every_layer_once(layers, stages, model):
    counts = layers_per_stage(parse(f"model={model}", f"model.num_layers={layers}").model, 128, stages)
    assert [i for part in layers_of_stages(counts) for i in part] == list(range(layers))
    assert len(counts) == stages and min(counts) >= 1
    assert max(counts[:-1], default=layers) - min(counts[:-1], default=layers) <= 1


def test_the_head_counts_in_the_balance():
    model = parse("model=tiny", "model.num_layers=8").model
    assert layers_per_stage(model, 128, 4) == [2, 2, 2, 2], "a small head is no reason to move a layer"
    model.vocab_size = 10_000  # the head's product now costs about seven layers
    assert layers_per_stage(model, 128, 4) == [3, 2, 2, 1]
