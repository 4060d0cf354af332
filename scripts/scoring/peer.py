"""What mlsysim (PyPI) predicts for the same runs: a peer of the planner, with its default settings, and not fitted.

It gets a run's shapes, layout, batch and network, and has its own figures of devices. It knows no context parallelism:
the ranks of cp count as replicas with shorter sequences. Of recomputation it knows all or nothing, and of precisions
none below fp8. Of GB200 and GB300 it has whole racks only, so they count as its B200, whose die they have.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from functools import cache
from typing import Any

from train.command.planning.job import Job
from train.command.planning.quantities import tokens_per_step
from train.config.plan import Plan
from train.config.schema import ActivationCheckpointing
from train.strategies.data.keys import FsdpKeys
from train.strategies.memory import num_parameters

INSTALL = 'pip install "strategy-lab[score]"'
DEVICES = {
    "a100_sxm": "A100",
    "a100_sxm_40gb": "A100_40GB",
    "h100_sxm": "H100",
    "h200_sxm": "H200",
    "b200_sxm": "B200",
    "gb200_nvl72": "B200",
    "gb300_nvl72": "B200",
}
PRECISIONS = {"bf16": "bf16", "fp8": "fp8", "nvfp4": "fp8"}


@cache
def installed() -> bool:
    return importlib.util.find_spec("mlsysim") is not None


def speed(job: Job) -> float:
    """Tokens per second and device; nan if mlsysim is not installed."""
    if not installed():
        return math.nan
    from mlsysim.solvers import DistributedModel

    plan = job.plan
    train, degrees, microbatches = plan.config.train, plan.degrees, plan.num_microbatches
    pipelined = degrees["pp"] > 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = DistributedModel().solve(
            workload(plan),
            fleet(plan),
            batch_size=train.global_batch_size * degrees["cp"],
            seq_len=train.seq_len // degrees["cp"],
            precision=PRECISIONS[job.products],
            tp_size=degrees["tp"],
            pp_size=degrees["pp"],
            v_stages=job.chunks,
            microbatch_count=microbatches,
            gradient_accumulation_steps=1 if pipelined else microbatches,
            zero_stage=zero_stage(plan),
            activation_recomputation=train.activation_checkpointing is ActivationCheckpointing.full,
        )
    return tokens_per_step(plan) / float(found.step_latency_total.m_as("s")) / plan.world_size


def zero_stage(plan: Plan) -> int:
    strategy = plan.config.strategy
    return strategy.zero_stage if isinstance(strategy, FsdpKeys) and plan.degrees["dp_shard"] > 1 else 0


def workload(plan: Plan) -> Any:
    from mlsysim.models.types import TransformerWorkload

    model = plan.config.model
    return TransformerWorkload(
        name="published",
        architecture="Transformer",
        parameters=f"{num_parameters(model)[0]} count",
        layers=model.num_layers,
        hidden_dim=model.dim,
        heads=model.num_heads,
        kv_heads=model.num_kv_heads,
    )


def fleet(plan: Plan) -> Any:
    """The nodes of the run; where its ranks fill no whole number of nodes, smaller ones."""
    from mlsysim import Hardware
    from mlsysim.systems.types import Fleet, NetworkFabric, Node

    hardware = plan.config.hardware
    assert hardware.devices_per_node is not None and hardware.node_gb_per_s is not None
    device = getattr(Hardware.Cloud, DEVICES[hardware.name])
    size = math.gcd(plan.world_size, hardware.linked_devices or hardware.devices_per_node)
    node = Node(
        name="node", accelerator=device, accelerators_per_node=size, intra_node_bw=device.nvlink.bandwidth_per_direction
    )
    each = hardware.node_gb_per_s / hardware.devices_per_node
    return Fleet(
        name="fleet",
        node=node,
        count=plan.world_size // size,
        fabric=NetworkFabric(name="network", bandwidth=f"{each} GB/s"),
    )
