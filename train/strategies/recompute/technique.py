"""Activation checkpointing as a `Technique`. Its key is train.activation_checkpointing, for every engine."""

from __future__ import annotations

from train.config.plan import Plan
from train.config.strategy import Strategy
from train.config.technique import Target, Technique
from train.strategies.recompute.rules import RULES, check_device, compiles_layers
from train.strategies.recompute.traffic import recomputes


def apply(target: Target) -> None:
    from train.strategies.recompute.apply import apply_checkpointing

    config = target.config
    check_device(Plan(config, target.mesh.size()), target.mesh.device_type)
    how = {"splits_backward": config.strategy.splits_backward(), "compiled": compiles_layers(config)}
    for layer in target.model.layers.values():
        apply_checkpointing(layer, config.train.activation_checkpointing, **how)


RECOMPUTE = Technique("activation checkpointing", (), Strategy, recomputes, RULES, apply=apply)
