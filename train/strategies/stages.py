"""What one rank of a pipeline does: keep its layers, and run them by one of torch's schedules."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

from train.config import Config
from train.model import Transformer
from train.step import Evaluate, ForwardBackward
from train.strategies.base import BATCH_AXES
from train.strategies.pipeline import layers_of_stage

if TYPE_CHECKING:
    from train.strategies.pipeline import Pipeline

SCHEDULE_CLASSES: dict[str, type[PipelineScheduleSingle]] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}


def keep_stage(model: Transformer, mesh: DeviceMesh) -> None:
    """Drop, in place, what other ranks of the 1-D `mesh` hold."""
    stage, num_stages = mesh.get_local_rank(), mesh.size()
    kept = {str(i) for i in layers_of_stage(len(model.layers), num_stages, stage)}
    for name in set(model.layers) - kept:
        del model.layers[name]
    if stage > 0:
        model.embed = None
    if stage < num_stages - 1:
        model.norm = model.head = None


def pipelined(
    wrapped: nn.Module, model: Transformer, mesh: DeviceMesh, config: Config
) -> tuple[ForwardBackward, Evaluate]:
    """The stage's schedule as the two callables that `Step` takes. Sends and receives run over `pp`."""
    strategy: Pipeline = config.strategy  # type: ignore[assignment]
    pp = mesh["pp"]
    first, last = pp.get_local_rank() == 0, pp.get_local_rank() == pp.size() - 1
    rows = config.train.micro_batch_size
    data_ranks = mesh[BATCH_AXES[0]].size() * mesh[BATCH_AXES[1]].size()
    num_microbatches = config.train.global_batch_size // (rows * data_ranks)
    weight = torch.ones_like(model.rope[0, 0, 0])  # the dtype of losses

    def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
        return model.loss(output, targets) * weight

    # Shapes are declared, so that no rank asks its neighbour: the residual stream is sharded over the sequence by tp.
    shards = mesh["tp"].size() if "tp" in strategy.mesh_axes() and strategy.sequence_parallel else 1
    vocab_shards = mesh["tp"].size() if "tp" in strategy.mesh_axes() and strategy.loss_parallel else 1
    seq_len = config.train.seq_len // mesh["cp"].size()
    tokens = torch.empty(rows, config.train.seq_len, dtype=torch.long, device="meta")
    hidden = torch.empty(rows, seq_len // shards, config.model.dim, dtype=model.compute_dtype, device="meta")
    logits = torch.empty(
        rows, seq_len, config.model.vocab_size // vocab_shards, dtype=model.compute_dtype, device="meta"
    )
    stage = PipelineStage(
        wrapped,
        pp.get_local_rank(),
        pp.size(),
        model.rope.device,
        input_args=tokens if first else hidden.requires_grad_(),
        output_args=logits.requires_grad_() if last else hidden.requires_grad_(),
        group=pp.get_group(),
    )
    schedule = SCHEDULE_CLASSES[strategy.schedule](stage, num_microbatches, loss_fn=loss_fn, scale_grads=False)

    def run(call: object, tokens: Tensor, targets: Tensor) -> Tensor:
        losses: list[Tensor] = []
        inputs = (tokens,) if first else ()
        call(*inputs, target=targets if last else None, losses=losses, return_outputs=False)  # type: ignore[operator]
        return torch.stack(losses).sum().detach() if losses else torch.zeros_like(weight)

    def forward_backward(tokens: Tensor, targets: Tensor, inverse_num_valid: Tensor) -> Tensor:
        nonlocal weight
        weight = inverse_num_valid
        return run(schedule.step, tokens, targets)

    def evaluate(tokens: Tensor, targets: Tensor) -> Tensor:
        nonlocal weight
        weight = torch.ones_like(model.rope[0, 0, 0])
        return run(schedule.eval, tokens, targets)

    return forward_backward, evaluate
