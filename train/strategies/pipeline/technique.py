"""Pipeline parallelism as a `Technique`; strategies/pipelined.py explains how it works."""

from __future__ import annotations

from train.config.plan import Plan
from train.config.technique import Technique
from train.strategies.pipeline.keys import PipelineKeys
from train.strategies.pipeline.rules import RULES
from train.strategies.pipeline.traffic import traffic


def applies(plan: Plan) -> bool:
    return isinstance(plan.config.strategy, PipelineKeys)


PIPELINE = Technique("pipeline parallelism", ("pp",), PipelineKeys, applies, RULES, traffic=traffic)
