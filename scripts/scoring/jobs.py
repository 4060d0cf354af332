"""A published run as a job of the cost model: a plan of this lab with the same shapes, layout and batch.

A plain feed-forward of width f becomes a gated one of width 2f/3, which has the same weights and FLOPs. Blank cells get
one default for a column, the same for every source:

    vocab            the embedding that n_params leaves over beside the layers; without it 50,257 (GPT-2's)
    sp               yes, where tp > 1          gpus_per_node   as in the GPU's usual node
    activation_ckpt  none                       zero_or_fsdp    ZeRO-1, reduced during the backward
    pp_schedule      1f1b                       virtual_stages  1, but 2 of a schedule in a V
    precision        16 bits                    interconnect    the network of the GPU's usual node
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import cache

from scripts.scoring.rows import COUNTS, Row
from train.command import cli
from train.command.planning.job import Job
from train.config.fields import MAX_VOCABULARY
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
from train.config.shapes import block
from train.config.strategy import Strategy
from train.strategies.pipelined import Pipeline
from train.strategies.spmd import Spmd

# the hardware file by what the cell `gpu` has in it, the first that matches
HARDWARE = {
    r"\bA100.*\b40": "a100_sxm_40gb",
    r"\bA100": "a100_sxm",
    r"\bH100": "h100_sxm",
    r"\bH200": "h200_sxm",
    r"\bB200": "b200_sxm",
    r"\bGB200": "gb200_nvl72",
    r"\bGB300": "gb300_nvl72",
}
OTHER_CARDS = "PCIE"  # they have no hardware file
PRODUCTS = {"": "bf16", "bf16": "bf16", "fp16": "bf16", "fp8": "fp8", "nvfp4": "nvfp4"}
VOCABULARY = 50_257
RECOMPUTED = {"full": ActivationCheckpointing.full, "selective": ActivationCheckpointing.selective}
NOTHING = ActivationCheckpointing.none
# the bubble of a schedule that splits the backward, as a share of 1f1b's: ZB-H1 a third, ZB-H2 and ZB-V none
# (arXiv:2401.10241), V-Half a half and V-Min two thirds (the README of sail-sg/zero-bubble-pipeline-parallelism)
BUBBLES = {"zb-1p": 1 / 3, "zb-h1": 1 / 3, "zb-2p": 0.0, "zb-2p*": 0.0, "zb-h2": 0.0, "zbv": 0.0, "v-half": 1 / 2,
           "v-min": 2 / 3}  # fmt: skip
V_SHAPED = ("zbv", "v-half", "v-min")  # the embedding and the head are on the same rank
CARDS = re.compile(r"(\d{1,6}) ?x[^0-9]*(\d{1,6}) ?Gb")  # "8x400Gb", "4x Omni-Path 100Gb"
PER_NODE = re.compile(r"(\d{1,6}) ?Gbps")


def job_of(row: Row) -> Job | None:
    """The job of a row; None if the GPU or the precision is unknown, the model is a mixture, or the counts are not
    those of a layout."""
    hardware, products = hardware_of(row), PRODUCTS.get(row.precision)
    if hardware is None or products is None or row.is_moe or not is_layout(row):
        return None
    config = _config(hardware)
    config = replace(
        config,
        model=_model(config, row),
        train=_train(config, row),
        hardware=_hardware(config, row),
        precision=Precision.bf16,
        strategy=_strategy(row),
    )
    plan = Plan(config, row.count("n_gpus"))
    return Job(
        plan,
        products=products,
        async_tp=plan.config.strategy.shards_sequence(),
        sends_parts=not is_deepspeed(row),
        reduces_late=is_deepspeed(row) or sharding(row).startswith("none"),
        bubble_share=BUBBLES.get(schedule(row), 1.0),
        chunks=chunks(row),
    )


def hardware_of(row: Row) -> str | None:
    gpu = row.cells["gpu"].upper()
    if OTHER_CARDS in gpu:
        return None
    return next((name for part, name in HARDWARE.items() if re.search(part, gpu)), None)


def is_layout(row: Row) -> bool:
    """Whether the counts are those of a layout that can run."""
    if not row.is_sound:
        return False
    n = {name: row.count(name) for name in COUNTS}
    divisible = (("d_model", "n_heads"), ("n_heads", "n_kv_heads"), ("n_heads", "tp"))
    return (
        n["dp"] * n["tp"] * n["pp"] * n["cp"] == n["n_gpus"]
        and not any(n[whole] % n[parts] for whole, parts in divisible)
        and n["tp"] <= n["d_ff"]
        and n["tp"] * n["cp"] <= n["seq_len"]
        and n["dp"] * n["micro_batch"] <= n["global_batch_seqs"]
        and n["pp"] * chunks(row) <= n["n_layers"] + 2
        and (schedule(row) not in V_SHAPED or chunks(row) == 2)
    )


def schedule(row: Row) -> str:
    return row.cells["pp_schedule"].lower() or "1f1b"


def chunks(row: Row) -> int:
    """The stages of each rank of pp."""
    return row.count("virtual_stages", 2 if schedule(row) in V_SHAPED else 1)


def sharding(row: Row) -> str:
    """The cell `zero_or_fsdp`, with one spelling of ZeRO's stages: zero-3."""
    return re.sub(r"zero[ _]?(?=\d)", "zero-", row.cells["zero_or_fsdp"].lower())


def is_deepspeed(row: Row) -> bool:
    """Whether the cell names nothing but a stage, which is DeepSpeed's own name for it."""
    return re.fullmatch(r"zero-\d", sharding(row)) is not None


@cache
def _config(hardware: str) -> Config:
    words = ["strategy=single", "model=llama_8b", f"hardware={hardware}"]
    return cli.parse(cli.parser("score_planner", ""), words)[0]


def _model(config: Config, row: Row) -> ModelConfig:
    width = row.count("d_ff")
    old = row.count("tp") > 1 and not shards_sequence(row)  # such code predates fused attention
    model = replace(
        config.model,
        num_layers=row.count("n_layers"),
        dim=row.count("d_model"),
        num_heads=row.count("n_heads"),
        num_kv_heads=row.count("n_kv_heads"),
        ffn_dim=width if is_gated(row) else max(round(width * 2 / 3), 1),
        max_seq_len=row.count("seq_len"),
        attention=AttentionKernel.eager if old else AttentionKernel.sdpa,
    )
    return replace(model, vocab_size=vocabulary(row, model))


def is_gated(row: Row) -> bool:
    return row.cells["ffn_type"].lower().endswith("glu")


def vocabulary(row: Row, model: ModelConfig) -> int:
    """The stated vocabulary, else that of an embedding that has the parameters which are not in layers. Models with a
    gated feed-forward are taken to have a head of its own. A number of parameters that is rounded too much for that,
    by a half of the result or more, counts as none."""
    total = row.number("n_params") or 0.0
    if row.cells["vocab"] or not total.is_integer():
        return row.count("vocab", VOCABULARY)
    layers = model.num_layers * sum(math.prod(shape) for shape in block(model).values())
    tables = model.dim * (2 if is_gated(row) else 1)
    digits = str(int(total))
    rounded = 10 ** (len(digits) - len(digits.rstrip("0"))) / 2
    rows = (total - layers) / tables
    return round(rows) if 2 * rounded / tables < rows <= MAX_VOCABULARY else VOCABULARY


def _train(config: Config, row: Row) -> TrainConfig:
    recomputed = row.cells["activation_ckpt"].lower()
    return replace(
        config.train,
        seq_len=row.count("seq_len"),
        global_batch_size=row.count("global_batch_seqs"),
        micro_batch_size=row.count("micro_batch"),
        activation_checkpointing=next((mode for word, mode in RECOMPUTED.items() if word in recomputed), NOTHING),
    )


def _hardware(config: Config, row: Row) -> HardwareConfig:
    """With the node that the row states. A node with fewer devices than usual has a smaller part of the network."""
    usual = config.hardware
    assert usual.devices_per_node is not None and usual.node_gb_per_s is not None
    size = row.count("gpus_per_node", usual.devices_per_node)
    network = usual.node_gb_per_s * size / usual.devices_per_node
    return replace(usual, devices_per_node=size, node_gb_per_s=stated_network(row.cells["interconnect"]) or network)


def stated_network(text: str) -> float:
    """The bandwidth of a node's network in GB/s that a cell states; 0 if it states none."""
    if cards := CARDS.search(text):
        return int(cards[1]) * int(cards[2]) / 8
    whole = PER_NODE.search(text)
    return int(whole[1]) / 8 if whole else 0.0


def shards_sequence(row: Row) -> bool:
    """Whether activations between blocks are sharded over tp; a blank cell says yes."""
    return row.count("tp") > 1 and not (row.cells["sp"] and row.says_no("sp"))


def _strategy(row: Row) -> Strategy:
    data = sharding(row)
    dp, tp, pp, cp = (row.count(name) for name in ("dp", "tp", "pp", "cp"))
    keys: dict[str, object] = {"name": "published", "tp": tp, "sequence_parallel": shards_sequence(row)}
    keys |= {"cp": cp, "cp_method": "ring"} if cp > 1 else {}
    stage = _stage(data)
    shards = math.gcd(int(found[1]), dp) if (found := re.search(r"shard=(\d{1,6})", data)) else dp
    if stage == 0:  # replicas whose gradients are all-reduced once a step; the lab has DDP without tp only
        keys |= {"dp_replicate": dp, "dp_shard": 1, "zero_stage": 1}
    else:
        keys |= {"dp_shard": shards, "zero_stage": stage}
        keys |= {"dp_replicate": dp // shards} if shards < dp else {}
    if pp == 1:
        return Spmd(**keys)  # type: ignore[arg-type]
    stages = layers(row.count("n_layers"), pp * chunks(row))
    own = [sum(stages[rank::pp]) for rank in range(pp)]
    if schedule(row) in V_SHAPED:  # the embedding and the head are on the same rank: here the last one
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
