"""A published run as a job of the cost model: a plan of this lab with the same shapes, layout and batch.

A plain feed-forward of width f becomes a gated one of width 2f/3, which has the same weights and FLOPs. Blank cells get
one default for a column, the same for every source:

    vocab            50,257 (GPT-2's)           sp              yes, where tp > 1
    activation_ckpt  none                       zero_or_fsdp    ZeRO-1, reduced during the backward
    pp_schedule      1f1b                       virtual_stages  1
    precision        bf16                       interconnect    the network of the GPU's usual node
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import cache

from scripts.scoring.rows import Row
from train.command import cli
from train.command.planning.job import Job
from train.config.plan import Plan
from train.config.schema import (
    ActivationCheckpointing,
    AttentionKernel,
    Config,
    HardwareConfig,
    ModelConfig,
    Precision,
    TrainConfig,
)
from train.config.strategy import Strategy
from train.strategies.pipelined import Pipeline
from train.strategies.spmd import Spmd

HARDWARE = {
    "A100-80GB": "a100_sxm",
    "A100 (capacity not stated)": "a100_sxm",
    "A100-40GB": "a100_sxm_40gb",
    "H100-80GB-SXM": "h100_sxm",
    "H200-SXM": "h200_sxm",
    "B200": "b200_sxm",
    "GB200": "gb200_nvl72",
    "GB300": "gb300_nvl72",
}
PRODUCTS = {"": "bf16", "bf16": "bf16", "fp16": "bf16", "fp8": "fp8", "nvfp4": "nvfp4"}
VOCABULARY = 50_257
RECOMPUTED = {"full": ActivationCheckpointing.full, "selective": ActivationCheckpointing.selective}
# the bubble of a schedule that splits the backward, as a share of 1f1b's: ZB-H1 a third, ZB-H2 none (arXiv:2401.10241)
BUBBLES = {"zb-1p": 1 / 3, "zb-2p": 0.0, "zb-2p*": 0.0, "zbv": 0.0}
CARDS = re.compile(r"(\d+)x[^0-9]*(\d+) ?Gb")  # "8x400Gb", "4x Omni-Path 100Gb"
PER_NODE = re.compile(r"(\d+) ?Gbps")
DEEPSPEED = re.compile(r"zero-?\d")  # nothing but the stage: DeepSpeed's own name for it


def job_of(row: Row) -> Job | None:
    """The job of a row; None if the GPU or the precision is unknown, or the layout is not one."""
    ranks = math.prod(row.count(name) for name in ("dp", "tp", "pp", "cp"))
    known = row.cells["gpu"] in HARDWARE and row.cells["precision"] in PRODUCTS
    if not known or ranks != row.count("n_gpus"):
        return None
    config = _config(HARDWARE[row.cells["gpu"]])
    data = row.cells["zero_or_fsdp"].lower()
    kind = row.cells["pp_schedule"] or "1f1b"
    config = replace(
        config,
        model=_model(config, row),
        train=_train(config, row),
        hardware=_hardware(config, row),
        precision=Precision.bf16,
        strategy=_strategy(row, data),
    )
    plan = Plan(config, row.count("n_gpus"))
    chunks = row.count("virtual_stages")
    if plan.num_microbatches < 1 or plan.num_stages * chunks > plan.config.model.num_layers + 2:
        return None
    own_engine = DEEPSPEED.fullmatch(data) is not None
    return Job(
        plan,
        products=PRODUCTS[row.cells["precision"]],
        async_tp=plan.config.strategy.shards_sequence(),
        sends_parts=not own_engine,
        reduces_late=own_engine or data.startswith("none"),
        bubble_share=BUBBLES.get(kind, 1.0),
        chunks=chunks,
    )


@cache
def _config(hardware: str) -> Config:
    words = ["strategy=single", "model=llama_8b", f"hardware={hardware}"]
    return cli.parse(cli.parser("score_planner", ""), words)[0]


def _model(config: Config, row: Row) -> ModelConfig:
    gated = row.cells["ffn_type"] == "swiglu"
    width = row.count("d_ff")
    old = row.cells["sp"] == "0" and row.count("tp") > 1  # such code predates fused attention
    return replace(
        config.model,
        num_layers=row.count("n_layers"),
        dim=row.count("d_model"),
        num_heads=row.count("n_heads"),
        num_kv_heads=row.count("n_kv_heads"),
        ffn_dim=width if gated else round(width * 2 / 3),
        vocab_size=row.count("vocab", VOCABULARY),
        max_seq_len=row.count("seq_len"),
        attention=AttentionKernel.eager if old else AttentionKernel.sdpa,
    )


def _train(config: Config, row: Row) -> TrainConfig:
    return replace(
        config.train,
        seq_len=row.count("seq_len"),
        global_batch_size=row.count("global_batch_seqs"),
        micro_batch_size=row.count("micro_batch"),
        activation_checkpointing=RECOMPUTED.get(row.cells["activation_ckpt"], ActivationCheckpointing.none),
    )


def _hardware(config: Config, row: Row) -> HardwareConfig:
    text = row.cells["interconnect"]
    if cards := CARDS.search(text):
        return replace(config.hardware, node_gb_per_s=int(cards[1]) * int(cards[2]) / 8)
    if whole := PER_NODE.search(text):
        return replace(config.hardware, node_gb_per_s=int(whole[1]) / 8)
    return config.hardware


def _strategy(row: Row, data: str) -> Strategy:
    dp, tp, pp, cp = (row.count(name) for name in ("dp", "tp", "pp", "cp"))
    keys: dict[str, object] = {"name": "published", "tp": tp, "sequence_parallel": tp > 1 and row.cells["sp"] != "0"}
    keys |= {"cp": cp, "cp_method": "ring"} if cp > 1 else {}
    stage = _stage(data)
    shards = math.gcd(int(found[1]), dp) if (found := re.search(r"shard=(\d+)", data)) else dp
    if stage == 0:  # replicas whose gradients are all-reduced once a step; the lab has DDP without tp only
        keys |= {"dp_replicate": dp, "dp_shard": 1, "zero_stage": 1}
    else:
        keys |= {"dp_shard": shards, "zero_stage": stage}
        keys |= {"dp_replicate": dp // shards} if shards < dp else {}
    if pp == 1:
        return Spmd(**keys)  # type: ignore[arg-type]
    stages = layers(row.count("n_layers"), pp * row.count("virtual_stages"))
    own = [sum(stages[rank::pp]) for rank in range(pp)]
    if row.cells["pp_schedule"] == "zbv":  # the embedding and the head are on the same rank: here the last one
        own = [sum(pair) for pair in zip(stages[:pp], stages[: pp - 1 : -1], strict=True)][::-1]
    keys |= {"pp": pp, "schedule": "1f1b", "zero_stage": 1}
    return Pipeline(**keys, layers_per_stage=own)  # type: ignore[arg-type]


def _stage(data: str) -> int:
    """ZeRO's stage; 0 is plain data parallelism."""
    if "zero-3" in data or ("fsdp" in data and "grad_op" not in data):
        return 3
    if "zero-2" in data or "grad_op" in data:
        return 2
    return 0 if data.startswith("none") or "zero-0" in data else 1


def layers(count: int, stages: int) -> list[int]:
    """The layers of each stage: equal; or the first and the last, or only the last, have one less, as the embedding and
    the head count as layers; else the first ones have one more."""
    if count % stages and (count + 2) % stages == 0:
        most = (count + 2) // stages
        return [most - 1, *[most] * (stages - 2), most - 1]
    if count % stages and (count + 1) % stages == 0:
        return [*[(count + 1) // stages] * (stages - 1), (count + 1) // stages - 1]
    return [count // stages + (i < count % stages) for i in range(stages)]
