"""DeepSpeed's `PipelineModule` as a `TrainStep`: 1F1B over `pp`, alone or with data ranks, which ZeRO-1 may shard.

Every rank describes the same transformer as a list of layers, and DeepSpeed builds only those of the rank's stage.
Blocks are spread evenly; the embedding is on the first stage, and the head on the last.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from train.config.strategy import StepResult
from train.model.spans import span
from train.model.transformer import Transformer
from train.ranks import gradients
from train.ranks.distributed import count_valid, inverse_valid
from train.strategies.deepspeed.engine import EngineStep, prepare, summed

if TYPE_CHECKING:
    from train.config.schema import Config

Fill = Callable[[nn.Module, str], None]


class EmbedLayer(nn.Module):
    """Tokens BT -> hidden states BTD."""

    def __init__(self, model: Transformer, fill: Fill) -> None:
        super().__init__()
        assert model.embed is not None
        self.embed, self.dropout, self.compute_dtype = model.embed, model.dropout, model.compute_dtype
        fill(self.embed, "embed.")

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.dropout(self.embed(tokens_BT).to(self.compute_dtype))


class BlockLayer(nn.Module):
    """Hidden states BTD -> hidden states BTD. DeepSpeed balances stages by this class's name."""

    def __init__(self, model: Transformer, fill: Fill, name: str) -> None:
        super().__init__()
        self.block, self.rope = model.layers[name], model.rope
        fill(self.block, f"layers.{name}.")

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.block(x_BTD, self.rope)


class HeadLayer(nn.Module):
    """Hidden states BTD -> logits BTV."""

    def __init__(self, model: Transformer, fill: Fill) -> None:
        super().__init__()
        assert model.norm is not None and model.head is not None
        self.norm, self.head = model.norm, model.head
        fill(self.norm, "norm.")
        fill(self.head, "head.")

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.head(self.norm(x_BTD))


def mark_as_own(parameters: Iterable[nn.Parameter]) -> None:
    """Mark the parameters as different on every stage, with Megatron's attribute. Otherwise DeepSpeed without ZeRO
    clips by the norm of the first stage's gradients only (0.19.8: `clip_grad_norm_` treats the stage as a
    tensor-parallel rank)."""
    for p in parameters:
        p.model_parallel = True  # type: ignore[attr-defined]


class PipeStep(EngineStep):
    """DeepSpeed's pipeline engine over `pp` and the data axes."""

    def __init__(self, model: Transformer, mesh: DeviceMesh, config: Config) -> None:
        super().__init__(model, mesh, config)
        fill = prepare(model, mesh, config)
        self.weight = torch.ones_like(model.rope[0, 0, 0])  # the weight of a token's loss in DeepSpeed's means
        from deepspeed.pipe import LayerSpec
        from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

        layers = [
            LayerSpec(EmbedLayer, model, fill),
            *(LayerSpec(BlockLayer, model, fill, name) for name in model.layers),
            LayerSpec(HeadLayer, model, fill),
        ]
        with redirect_stdout(io.StringIO()):  # DeepSpeed prints its topology
            module = self.deepspeed.PipelineModule(
                layers=layers,
                topology=PipeDataParallelTopology(num_pp=mesh["pp"].size(), num_dp=self.data_ranks),
                loss_fn=self.loss_of,
                partition_method="type:BlockLayer",
            )
        self.keep_stage()
        mark_as_own(model.parameters())
        self.initialise(module, mpu=None)
        self.norm: Tensor | None = None
        self.update = self.engine._take_model_step
        self.engine._take_model_step = self.measure_and_update  # private; deepspeed 0.19
        self.name_instructions()

    def name_instructions(self) -> None:
        """Record the engine's work as regions named by stage and microbatch (a private table; deepspeed 0.19)."""
        from deepspeed.runtime.pipe import schedule

        stage, done = self.mesh["pp"].get_local_rank(), Counter[str]()
        table = dict(self.engine._INSTRUCTION_MAP)
        kinds = {schedule.ForwardPass: "F", schedule.BackwardPass: "B"}
        updates = (schedule.ReduceTiedGrads, schedule.ReduceGrads, schedule.OptimizerStep)

        def named(kind: str, run: Callable[..., None]) -> Callable[..., None]:
            def instruction(engine: Any, *args: Any, **kwargs: Any) -> None:
                with span(kind, stage, done[kind] % self.num_microbatches) if kind in "FB" else span(kind):
                    run(engine, *args, **kwargs)
                done[kind] += 1

            return instruction

        for instruction in (*kinds, *updates):
            table[instruction] = named(kinds.get(instruction, "optimiser"), table[instruction])
        self.engine._INSTRUCTION_MAP = table

    def keep_stage(self) -> None:
        """Remove the layers that DeepSpeed did not build on this stage."""
        for name in [name for name, layer in self.model.layers.items() if next(layer.parameters()).is_meta]:
            del self.model.layers[name]
        for end in ("embed", "norm", "head"):
            if next(getattr(self.model, end).parameters()).is_meta:
                setattr(self.model, end, None)

    def loss_of(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self.model.loss(logits, targets) * self.weight

    def weigh_tokens(self, weight: Tensor) -> None:
        """Give every token's loss this weight. The factors undo DeepSpeed's means over microbatches and ranks."""
        self.weight = summed(weight, self.data_ranks) * self.num_microbatches

    def batches(self, tokens: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        rows = self.config.train.micro_batch_size
        return zip(tokens.split(rows), targets.split(rows), strict=True)

    def measure_and_update(self, lr_kwargs: object) -> None:
        self.gradients_ready()
        if not self.engine.zero_optimization():  # without ZeRO, its clipping does not give the norm
            grads = [p.grad for p in self.parameters.values() if p.grad is not None]
            self.norm = gradients.global_norm(grads, self.mesh["pp"].get_group(), self.weight.device)
        self.update(lr_kwargs)

    def __call__(self, tokens: Tensor, targets: Tensor, *, lr: float) -> StepResult:
        self.weigh_tokens(inverse_valid(targets, self.mesh, self.weight.dtype))
        self.set_lr(lr)
        loss = self.engine.train_batch(self.batches(tokens, targets))
        norm = self.norm if self.norm is not None else self.engine.get_global_grad_norm()
        return StepResult(loss=loss, grad_norm=torch.as_tensor(norm, device=loss.device))

    @torch.no_grad()
    def evaluate(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        self.weigh_tokens(torch.ones_like(self.weight))
        return self.engine.eval_batch(self.batches(tokens, targets)).squeeze(), count_valid(targets, self.mesh)
