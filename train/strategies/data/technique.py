"""FSDP2 and DDP, each as a `Technique`; `apply.py` explains how they work."""

from __future__ import annotations

from train.config.plan import Plan
from train.config.technique import Target, Technique
from train.strategies.data.keys import DdpKeys, FsdpKeys
from train.strategies.data.rules import DDP_RULES, FSDP_RULES, READ_BY_DDP, READ_BY_FSDP
from train.strategies.data.split import split
from train.strategies.data.traffic import ddp, fsdp


def applies_fsdp(plan: Plan) -> bool:
    return isinstance(plan.config.strategy, FsdpKeys) and plan.config.strategy.uses_fsdp()


def applies_ddp(plan: Plan) -> bool:
    return isinstance(plan.config.strategy, DdpKeys) and plan.config.strategy.uses_ddp()


def apply_fsdp(target: Target) -> None:
    from train.strategies.data.apply import apply_fsdp

    apply_fsdp(target)


def apply_ddp(target: Target) -> None:
    from train.strategies.data.apply import apply_ddp

    apply_ddp(target)


FSDP = Technique(
    "FSDP",
    ("dp_shard",),
    FsdpKeys,
    applies_fsdp,
    FSDP_RULES,
    split,
    gathers=True,
    traffic=fsdp,
    apply=apply_fsdp,
    read_when=READ_BY_FSDP,
)
DDP = Technique(
    "DDP",
    ("dp_replicate",),
    DdpKeys,
    applies_ddp,
    DDP_RULES,
    traffic=ddp,
    apply=apply_ddp,
    read_when=READ_BY_DDP,
)
