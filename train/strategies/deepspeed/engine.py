"""A `TrainStep` around `deepspeed.initialize`: what both of its engines share, and the ZeRO engine's step.

DeepSpeed averages gradients over the data ranks; here they are sums, of losses that are divided by the global number
of valid tokens. `summed` undoes the average, and nothing else in the step knows of it. Weights stay float32 for
DeepSpeed under every precision: the model itself casts for compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from train.config.plan import Plan
from train.config.strategy import BATCH_AXES, StepResult
from train.model.spans import span
from train.model.transformer import Transformer
from train.ranks.distributed import count_valid, inverse_valid, own_device, sum_over
from train.ranks.optim import build_optimiser, set_lr
from train.ranks.state import ShardedState, num_bytes
from train.strategies.compile.technique import COMPILE
from train.strategies.deepspeed.settings import engine_config, load_deepspeed
from train.strategies.deepspeed.strategy import DeepSpeed
from train.strategies.recompute.technique import RECOMPUTE
from train.strategies.target import new_target, seed_dropout

if TYPE_CHECKING:
    from train.config.schema import Config


def prepare(model: Transformer, mesh: DeviceMesh, config: Config) -> Callable[[torch.nn.Module, str], None]:
    """The techniques that are the lab's under every engine; returns what gives a module memory and values."""
    target = new_target(model, mesh, config)
    for technique in (RECOMPUTE, COMPILE):
        if technique.applies(Plan(config, mesh.size())) and technique.apply is not None:
            technique.apply(target)
    seed_dropout(mesh, config, target.mask_axes)
    return target.fill


def summed(loss: Tensor, data_ranks: int) -> Tensor:
    """The loss whose gradient, averaged over the data ranks, is the sum of the ranks' gradients."""
    return loss * data_ranks


def bytes_of(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the memory behind tensors, counted once where they share it."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


class EngineStep:
    """What both engines share. `engine` is made by the subclass."""

    engine: Any

    def __init__(self, model: Transformer, mesh: DeviceMesh, config: Config) -> None:
        self.model, self.mesh, self.config = model, mesh, config
        self.on_gradients: Callable[[], None] | None = None
        self.deepspeed = load_deepspeed(own_device(mesh))
        plan = Plan(config, mesh.size())
        self.strategy = plan.keys(DeepSpeed)
        self.data_ranks, self.num_microbatches = plan.data_ranks, plan.num_microbatches
        self.gradient_bytes = 0

    def initialise(self, module: torch.nn.Module, mpu: object | None, **more: Any) -> None:
        """Hand the materialised module and the lab's own optimiser to DeepSpeed, with `more` of its configuration.
        Broadcasts the weights."""
        self.parameters = dict(self.model.named_parameters())
        self.engine = self.deepspeed.initialize(
            model=module,
            optimizer=build_optimiser(self.parameters, self.config.optim),
            config=engine_config(self.config, self.num_microbatches) | more,
            mpu=mpu,
            dist_init_required=False,
        )[0]
        self.state = ShardedState(
            self.parameters, self.engine.optimizer, self.mesh["pp"].get_group(), self.config.model
        )

    def gradients_ready(self) -> None:
        """Between DeepSpeed's reduction and its clipping and update."""
        self.gradient_bytes = bytes_of(self._gradients())
        if self.strategy.zero_stage < 2:
            # whole until the backward's end, though stage 1 has cut them by now: one for each parameter
            self.gradient_bytes = num_bytes(self.parameters.values())
        if self.on_gradients is not None:
            self.on_gradients()

    def set_lr(self, lr: float) -> None:
        set_lr(self.engine.optimizer, lr)

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Collective, as `safe_get_full_fp32_param` is: an all-reduce over the data ranks for each parameter."""
        get = self.deepspeed.utils.safe_get_full_fp32_param
        return self.full(lambda p: p.detach() if (full := get(p)) is None else full)

    def full_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Collective, and only from `on_gradients`: DeepSpeed frees them with its update."""
        return self.full(self.deepspeed.utils.safe_get_full_grad)

    def full(self, of: Callable[[torch.nn.Parameter], Tensor | None]) -> Iterator[tuple[str, Tensor]]:
        """`ShardedState.full` of what DeepSpeed has put together over its data ranks."""
        return self.state.full(of)

    def state_tensors(self) -> dict[str, Iterable[Tensor]]:
        """`optimiser` has the partition of master weights in it that DeepSpeed keeps beside the parameters."""
        optimiser = self.engine.optimizer
        inner = getattr(optimiser, "optimizer", optimiser)
        parameters = list(self._parameters())
        masters = [p for group in inner.param_groups for p in group["params"]]
        masters += getattr(
            optimiser, "fp32_partitioned_groups_flat", []
        )  # stage 3's; its groups are empty between steps
        states = [s for state in inner.state.values() for s in state.values() if isinstance(s, Tensor)]
        kept = {p.untyped_storage().data_ptr() for p in parameters}
        return {
            "parameters": parameters,
            "gradients": [g for g in self._gradients() if g is not None],
            "optimiser": [s for s in (*masters, *states) if s.untyped_storage().data_ptr() not in kept],
        }

    def state_bytes(self) -> dict[str, int]:
        tensors = self.state_tensors()
        return {
            "parameters": bytes_of(tensors["parameters"]),
            "gradients": self.gradient_bytes,
            "optimiser": bytes_of(tensors["optimiser"]),
        }

    def _parameters(self) -> Iterator[Tensor]:
        for p in self.parameters.values():
            yield getattr(p, "ds_tensor", p)

    def _gradients(self) -> Iterator[Tensor | None]:
        for p in self.parameters.values():
            yield p.grad
        for partitions in getattr(self.engine.optimizer, "averaged_gradients", {}).values():
            yield from partitions or ()


class DataParallelUnit:
    """The mesh, as DeepSpeed asks for it: it then makes no groups of its own."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.data, self.model = mesh["dp_shard"], mesh["pp"]

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.data.get_group()

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.data.get_group())

    def get_data_parallel_rank(self) -> int:
        return self.data.get_local_rank()

    def get_data_parallel_world_size(self) -> int:
        return self.data.size()

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.model.get_group()

    def get_model_parallel_rank(self) -> int:
        return self.model.get_local_rank()

    def get_model_parallel_world_size(self) -> int:
        return self.model.size()


class ZeroStep(EngineStep):
    """ZeRO stages 1 to 3 over `dp_shard`."""

    def __init__(self, model: Transformer, mesh: DeviceMesh, config: Config) -> None:
        super().__init__(model, mesh, config)
        prepare(model, mesh, config)(model, "")
        self.initialise(model, DataParallelUnit(mesh))

    def __call__(self, tokens: Tensor, targets: Tensor, *, lr: float) -> StepResult:
        inverse_num_valid = inverse_valid(targets, self.mesh, self.model.rope.dtype)
        self.set_lr(lr)
        rows, losses = self.config.train.micro_batch_size, []
        self.model.train()
        for i, (inputs, labels) in enumerate(zip(tokens.split(rows), targets.split(rows), strict=True), start=1):
            with span("F", 0, i - 1):
                loss = self.model.loss(self.engine(inputs), labels) * inverse_num_valid
            with span("B", 0, i - 1):
                # not its mean over microbatches either: the loss is divided by all tokens already
                self.engine.backward(summed(loss, self.data_ranks), scale_wrt_gas=False)
            losses.append(loss.detach())
            with span("optimiser"):
                if i == self.num_microbatches:
                    self.gradients_ready()
                self.engine.step()  # clips and updates after the last microbatch, only counts before
        norm = torch.as_tensor(self.engine.get_global_grad_norm(), device=losses[0].device)
        return StepResult(loss=sum_over(torch.stack(losses).sum(), self.mesh, *BATCH_AXES), grad_norm=norm)

    @torch.no_grad()
    def evaluate(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.config.train.micro_batch_size
        batches = zip(tokens.split(rows), targets.split(rows), strict=True)
        self.model.eval()  # no dropout
        loss_sum = torch.stack([self.model.loss(self.engine(inputs), labels) for inputs, labels in batches]).sum()
        self.model.train()
        return sum_over(loss_sum, self.mesh, *BATCH_AXES), count_valid(targets, self.mesh)
