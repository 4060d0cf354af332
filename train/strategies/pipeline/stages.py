"""One rank of a pipeline: it keeps the layers of its stages, and runs them by one of torch's schedules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.pipelining.schedules import PipelineScheduleSingle
from torch.nn.parallel import DistributedDataParallel

from train.config.plan import Plan
from train.config.schema import Config
from train.config.shapes import chunk, token_dim
from train.model.spans import span
from train.model.transformer import Transformer, dtypes
from train.strategies.pipeline.placement import ScheduleFacts, rank_of_stage
from train.strategies.pipeline.timetable import forward_ticks

if TYPE_CHECKING:
    from train.step import Evaluate, ForwardBackward
    from train.strategies.pipeline.keys import PipelineKeys
    from train.strategies.pipeline.tied import Tied

# (a stage's model on meta, mesh, config, meshes that all stages of a rank share) -> the module to call
Apply = Callable[[Transformer, DeviceMesh, Config, dict[str, DeviceMesh | None]], nn.Module]


@dataclass(frozen=True)
class Stages:
    """This rank's stages by number. `parts`: their models. `wrapped`: the modules to call instead of the models."""

    num_stages: int
    num_ranks: int
    rank: int
    v_shaped: bool
    parts: dict[int, Transformer]
    wrapped: dict[int, nn.Module]

    def rank_of(self, stage: int) -> int:
        return rank_of_stage(stage, self.num_ranks, v_shaped=self.v_shaped)

    @property
    def data_parallel(self) -> bool:
        """Whether FSDP or DDP owns each stage's parameters."""
        return any(isinstance(wrapped, FSDPModule | DistributedDataParallel) for wrapped in self.wrapped.values())


def build_stages(
    model: Transformer, mesh: DeviceMesh, config: Config, keys: PipelineKeys, apply_techniques: Apply
) -> Stages:
    """Make a model of each of this rank's stages, sharded and with its weights. Collective over the mesh.

    Afterwards `model`, which was on meta, has the modules of all these stages under their global names, and the loss of
    the last stage if it is here.
    """
    pp = mesh["pp"]
    rank, num_ranks = pp.get_local_rank(), pp.size()
    layers = keys.layers_of(config.model, config.train.seq_len, num_ranks)
    meshes: dict[str, DeviceMesh | None] = {}
    parts: dict[int, Transformer] = {}
    wrapped: dict[int, nn.Module] = {}
    for stage in keys.stages_of(rank, num_ranks):
        part = parts[stage] = Transformer(config.model, **dtypes(config.precision))
        keep_stage(part, layers[stage], first=stage == 0, last=stage == len(layers) - 1)
        part.dropout = model.dropout  # shared, so that train() and eval() of `model` change it too
        wrapped[stage] = apply_techniques(part, mesh, config, meshes)
    model.layers = nn.ModuleDict({name: layer for part in parts.values() for name, layer in part.layers.items()})
    for end in ("embed", "norm", "head"):
        setattr(
            model, end, next((module for part in parts.values() if (module := getattr(part, end)) is not None), None)
        )
    last = parts.get(len(layers) - 1)
    model.loss = last.loss if last is not None else model.loss
    model.rope = next(iter(parts.values())).rope
    return Stages(len(layers), num_ranks, rank, keys.facts().v_shaped, parts, wrapped)


def keep_stage(model: Transformer, layers: range, *, first: bool, last: bool) -> None:
    """Remove, in place, the layers of other stages."""
    for name in set(model.layers) - {str(i) for i in layers}:
        del model.layers[name]
    if not first:
        model.embed = None
    if not last:
        model.norm = model.head = None


@dataclass(frozen=True)
class StageShapes:
    """Meta tensors with the shapes of one microbatch: tokens go into the first stage, hidden states go from stage to
    stage, and what goes into the loss comes out of the last."""

    tokens: Tensor
    hidden: Tensor
    result: Tensor


def stage_shapes(config: Config, mesh: DeviceMesh, dtype: torch.dtype) -> StageShapes:
    """The shapes are computed here, so that no rank must ask its neighbour. cp shards the sequence; tp shards the
    tokens of hidden states, and the logits over the vocabulary. A loss in chunks makes the logits itself."""
    rows, tp = config.train.micro_batch_size, mesh["tp"].size()
    seq_len = config.train.seq_len // mesh["cp"].size()  # the first stage gets whole rows and selects its tokens
    hidden = [rows, seq_len]
    if config.strategy.shards_sequence():
        hidden[token_dim(rows, tp)] //= tp
    width = config.model.vocab_size
    if config.train.loss_chunks > 1:
        width = config.model.dim
    elif config.strategy.shards_logits():
        width = len(chunk(width, tp, mesh["tp"].get_local_rank()))
    return StageShapes(
        torch.empty(rows, config.train.seq_len, dtype=torch.long, device="meta"),
        torch.empty(*hidden, config.model.dim, dtype=dtype, device="meta", requires_grad=True),
        torch.empty(rows, seq_len, width, dtype=dtype, device="meta", requires_grad=True),
    )


def pipelined(
    stages: Stages, tied: Tied, mesh: DeviceMesh, config: Config, keys: PipelineKeys
) -> tuple[ForwardBackward, Evaluate]:
    """The two callables of `Step`, which run the schedule. They send and receive over `pp`."""
    group, last = mesh["pp"].get_group(), stages.num_stages - 1
    any_part = next(iter(stages.parts.values()))
    loss = stages.parts[last].loss if last in stages.parts else any_part.loss
    device, loss_dtype = any_part.rope.device, any_part.rope.dtype
    shapes = stage_shapes(config, mesh, any_part.compute_dtype)
    num_microbatches = Plan(config, mesh.size()).num_microbatches
    weight = torch.ones((), dtype=loss_dtype, device=device)

    def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
        return loss(output, targets) * weight

    schedule = build_schedule(keys.facts(), stages, shapes, group, num_microbatches, loss_fn)

    def forward_backward(tokens: Tensor, targets: Tensor, inverse_num_valid: Tensor) -> Tensor:
        nonlocal weight
        weight = inverse_num_valid
        tied.follow()
        losses: list[Tensor] = []
        inputs = (tokens,) if 0 in stages.parts else ()
        target = targets if last in stages.parts else None
        schedule.step(*inputs, target=target, losses=losses, return_outputs=False)
        tied.sum_pair()
        return torch.stack(losses).sum().detach() if losses else torch.zeros_like(weight)

    def evaluate(tokens: Tensor, targets: Tensor) -> Tensor:
        tied.follow()
        rows = config.train.micro_batch_size
        labels = targets.split(rows)
        losses = run_forwards(stages, tokens.split(rows), shapes.hidden, group, lambda i, out: loss(out, labels[i]))
        return torch.stack(losses).sum() if losses else torch.zeros((), dtype=loss_dtype, device=device)

    return forward_backward, evaluate


class RecordedStage(PipelineStage):
    """torch's `PipelineStage`, whose work is recorded as regions named by stage and microbatch."""

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        # torch 2.11 opens connections with these before the first step, also where both stages of a V are on one rank;
        # a rank of gloo cannot send to itself. Later versions open none, or do not need these.
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with span("F", self.stage_index, fwd_chunk_id):
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        with span("B" if full_backward else "I", self.stage_index, bwd_chunk_id):
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        with span("W", self.stage_index, bwd_chunk_id):
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)


def build_schedule(
    facts: ScheduleFacts,
    stages: Stages,
    shapes: StageShapes,
    group: dist.ProcessGroup,
    num_microbatches: int,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
) -> Any:
    """torch's schedule for this rank's stages. It does not scale gradients, because losses are sums that are already
    divided by the global number of valid tokens."""
    last = stages.num_stages - 1
    own = [
        RecordedStage(
            wrapped,
            stage,
            stages.num_stages,
            stages.parts[stage].rope.device,
            input_args=shapes.tokens if stage == 0 else shapes.hidden,
            output_args=shapes.result if stage == last else shapes.hidden,
            group=group,
        )
        for stage, wrapped in stages.wrapped.items()
    ]
    schedule_class: Any = getattr(schedules, facts.class_name)
    of_rank: Any = own[0] if issubclass(schedule_class, PipelineScheduleSingle) else own
    return schedule_class(of_rank, num_microbatches, loss_fn=loss_fn, scale_grads=False)


def run_forwards(
    stages: Stages,
    inputs: tuple[Tensor, ...],
    hidden: Tensor,
    group: dist.ProcessGroup,
    finish: Callable[[int, Tensor], Tensor],
) -> list[Tensor]:
    """Run all microbatches through all stages, without a backward. Returns `finish(i, logits)` of each microbatch on
    the last stage's rank, and an empty list on other ranks.

    torch's `eval` of a schedule also goes through the actions of the backward, and fails for schedules in a V. Here
    ranks work in ticks. The results of a tick are sent in one batch of sends and receives, which cannot deadlock.
    """
    arrived: dict[tuple[int, int], Tensor] = {(0, i): tokens for i, tokens in enumerate(inputs)}
    finished: list[Tensor] = []
    for tick in forward_ticks(stages.num_stages, stages.num_ranks, len(inputs), v_shaped=stages.v_shaped):
        ops: list[dist.P2POp] = []
        for rank, stage, i in tick:
            following, peer = stage + 1, stages.rank_of(stage + 1) if stage + 1 < stages.num_stages else None
            if rank == stages.rank:
                with span("F", stage, i):
                    out = stages.wrapped[stage](arrived.pop((stage, i)))
                    if peer is None:
                        finished.append(finish(i, out))
                if peer == rank:
                    arrived[following, i] = out
                elif peer is not None:
                    ops.append(dist.P2POp(dist.isend, out.contiguous(), group=group, group_peer=peer))
            elif peer == stages.rank:
                buffer = torch.empty_like(hidden, device=stages.parts[following].rope.device, requires_grad=False)
                arrived[following, i] = buffer
                ops.append(dist.P2POp(dist.irecv, buffer, group=group, group_peer=rank))
        for work in dist.batch_isend_irecv(ops) if ops else ():
            work.wait()
    return finished
