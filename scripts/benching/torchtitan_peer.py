"""torchtitan's Llama 3 on the shapes of a config: the peer of scripts/bench_step.py.

The model, its parallelisation, compilation, optimiser, clipping and loss are torchtitan's own (PyPI, version 0.2.2; it
is optional). The step is that of its Trainer (`train_step`) without data loading, checkpoints and logging.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from train.config.plan import Plan
from train.config.problems import EXIT_ENVIRONMENT, BadInput, Problem
from train.config.schema import ActivationCheckpointing, Config, Precision
from train.config.world import World
from train.model.transformer import IGNORE_INDEX
from train.ranks.optim import lr_at
from train.strategies.spmd import Spmd

AXES = {"dp_replicate", "dp_shard", "tp"}  # that this file knows how to ask torchtitan for
NONE, PRECISIONS = ActivationCheckpointing.none.value, "precision=bf16 or float32 here"
LAYOUTS = "single, dp, fsdp, hsdp, tp, fsdp_tp"
HIDDEN_UNIT = 256  # its feed-forward's width is a multiple of this
Loop = Callable[[int], None]


def check(config: Config, device: torch.device) -> None:
    """Raises BadInput if torchtitan is missing, or cannot train this model in this layout."""
    if importlib.util.find_spec("torchtitan") is None:
        message = "torchtitan is not installed"
        raise BadInput(Problem("peer", message, 'pip install "strategy-lab[peer]"', exit_code=EXIT_ENVIRONMENT))
    model, strategy, hidden = config.model, config.strategy, _hidden(config.model.dim)
    axes, recomputes = {*strategy.mesh_axes()}, config.train.activation_checkpointing
    known = isinstance(strategy, Spmd) and (axes in (set(), {"dp_replicate"}, {"tp"}) or strategy.frees_parameters())
    wrong = [
        said
        for found, said in (
            (device.type == "cpu", "it needs a GPU"),
            (not known or not axes <= AXES, f"strategy={strategy.name} is not one of {LAYOUTS}"),
            (model.tie_embeddings, "its embedding and its head are two weights"),
            (model.num_experts > 0, "its mixtures are other models"),
            (model.dropout > 0, "it has no dropout"),
            (model.ffn_dim != hidden, f"model.ffn_dim must be {hidden} with model.dim={model.dim}"),
            (recomputes is not ActivationCheckpointing.none, f"it is asked for train.activation_checkpointing={NONE}"),
            (config.precision not in (Precision.bf16, Precision.float32), f"it is asked for {PRECISIONS}"),
        )
        if found
    ]
    if wrong:
        raise BadInput(Problem("peer", f"torchtitan cannot train this: {'; '.join(wrong)}", "leave peer= out"))


def _hidden(dim: int) -> int:
    return -(-int(2 * 4 * dim / 3) // HIDDEN_UNIT) * HIDDEN_UNIT


def peer_loop(
    config: Config, world: World, device: torch.device, next_batch: Callable[[int], tuple[Tensor, Tensor]]
) -> Loop:
    """One step of torchtitan with this rank's rows of the global batch. Collective."""
    from torchtitan.components.loss import build_cross_entropy_loss
    from torchtitan.components.optimizer import build_optimizers
    from torchtitan.distributed import ParallelDims
    from torchtitan.distributed import utils as dist_utils
    from torchtitan.models.llama3 import Transformer, TransformerModelArgs, parallelize_llama

    found, job = Plan(config, world.world_size).degrees, _job(config)
    degrees = {axis: found[axis] for axis in sorted(AXES)}
    dims = ParallelDims(**degrees, cp=1, pp=1, ep=1, etp=1, world_size=world.world_size)
    dims.build_mesh()
    shape = config.model
    args = TransformerModelArgs(
        dim=shape.dim, n_layers=shape.num_layers, n_heads=shape.num_heads, n_kv_heads=shape.num_kv_heads,
        vocab_size=shape.vocab_size, multiple_of=HIDDEN_UNIT, rope_theta=shape.rope_theta,
        max_seq_len=config.train.seq_len,
    )  # fmt: skip
    # Without FSDP, torchtitan has no mixed precision under tp, so its parameters are those of the computation there.
    alone = degrees["tp"] > 1 and degrees["dp_shard"] == 1
    own = torch.bfloat16 if alone and config.precision is Precision.bf16 else torch.float32
    with torch.device("meta"):
        model = Transformer(args).to(own)
    model = parallelize_llama(model, dims, job)
    model.to_empty(device=device)
    with torch.no_grad():
        model.init_weights(buffer_device=None)
    model.train()
    loss_of, optimisers = build_cross_entropy_loss(job), build_optimizers([model], job.optimizer, dims)
    context = dist_utils.get_train_context(dims.tp_enabled)
    amp = dist_utils.maybe_enable_amp(dims, job.training.mixed_precision_param, device.type)

    def step(index: int) -> None:
        tokens, targets = next_batch(index)
        optimisers.zero_grad()
        valid: Any = (targets != IGNORE_INDEX).sum()
        valid = dist_utils.dist_sum(valid, dims.get_mesh("batch")) if dims.dp_enabled else valid.float()
        rows = config.train.micro_batch_size
        for x, y in zip(tokens.split(rows), targets.split(rows), strict=True):
            with context():
                with amp:
                    loss = loss_of(model(x), y) / valid
                loss.backward()
        dist_utils.clip_grad_norm_([*model.parameters()], config.train.clip_norm, foreach=True)
        for optimiser in optimisers.optimizers:
            for group in optimiser.param_groups:
                group["lr"] = lr_at(index, config.train.steps, config.optim)
        optimisers.step()

    return step


def _job(config: Config) -> Any:
    """Its own configuration, with its defaults for what the lab does not name."""
    from torchtitan.config import JobConfig

    job = JobConfig()
    job.training.seq_len, job.training.local_batch_size = config.train.seq_len, config.train.micro_batch_size
    job.training.mixed_precision_param = "bfloat16" if config.precision is Precision.bf16 else "float32"
    job.compile.enable, job.activation_checkpoint.mode = config.compile.enabled, "none"
    job.optimizer = dataclasses.replace(
        job.optimizer, lr=config.optim.lr, weight_decay=config.optim.weight_decay, implementation="fused"
    )
    return job
