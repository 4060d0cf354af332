"""A `TrainStep` around `deepspeed.initialize`: the code that both engines share, and the step of the ZeRO engine.

DeepSpeed averages gradients over the data ranks, but the lab needs their sum, because losses are already divided by the
global number of valid tokens. `summed` undoes the average, and nothing else in the step depends on it. DeepSpeed keeps
float32 weights at every precision; the model itself casts them for the computation.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from train.config.plan import Plan
from train.config.strategy import BATCH_AXES, Read, StepResult
from train.model.spans import span
from train.model.transformer import Transformer
from train.ranks.distributed import count_valid, inverse_valid, own_device, sum_over
from train.ranks.optim import build_optimiser, set_lr
from train.ranks.state import Piece, ShardedState, num_bytes
from train.strategies.compile.technique import COMPILE
from train.strategies.deepspeed import saving
from train.strategies.deepspeed.settings import engine_config, load_deepspeed
from train.strategies.deepspeed.strategy import DeepSpeed
from train.strategies.recompute.technique import RECOMPUTE
from train.strategies.target import new_target, seed_dropout

if TYPE_CHECKING:
    from train.config.schema import Config


def prepare(model: Transformer, mesh: DeviceMesh, config: Config) -> Callable[[torch.nn.Module, str], None]:
    """Apply activation checkpointing and compilation, which are the lab's own under every engine. Returns the function
    that gives a module memory and values."""
    target = new_target(model, mesh, config)
    for technique in (RECOMPUTE, COMPILE):
        if technique.applies(Plan(config, mesh.size())) and technique.apply is not None:
            technique.apply(target)
    seed_dropout(mesh, config, target.mask_axes)
    return target.fill


def summed(loss: Tensor, data_ranks: int) -> Tensor:
    """The loss multiplied so that the average of its gradients over the data ranks is the sum that is needed."""
    return loss * data_ranks


def bytes_of(tensors: Iterable[Tensor | None]) -> int:
    """The number of bytes of the tensors' memory. Memory that several tensors share counts once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


class EngineStep:
    """The base of both engines. The subclass makes `engine`, by `initialise`."""

    engine: Any

    def __init__(self, model: Transformer, mesh: DeviceMesh, config: Config) -> None:
        self.model, self.mesh, self.config = model, mesh, config
        self.on_gradients: Callable[[], None] | None = None
        self.deepspeed = load_deepspeed(own_device(mesh))
        plan = Plan(config, mesh.size())
        self.strategy = plan.keys(DeepSpeed)
        self.data_ranks, self.num_microbatches = plan.data_ranks, plan.num_microbatches
        self.gradient_scale = float(self.data_ranks)
        self.gradient_bytes = 0

    def initialise(self, module: torch.nn.Module, mpu: object | None, **more: Any) -> None:
        """Make the engine from the materialised module and the lab's own optimiser. `more`: additional configuration of
        DeepSpeed. Collective: DeepSpeed broadcasts the weights."""
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
        """Call it between DeepSpeed's reduction of the gradients and its clipping."""
        self.gradient_bytes = bytes_of(self._gradients())
        if self.strategy.zero_stage < 2:
            # At the end of the backward each parameter had a whole gradient, although stage 1 has sharded them since.
            self.gradient_bytes = num_bytes(self.parameters.values())
        if self.on_gradients is not None:
            self.on_gradients()

    def set_lr(self, lr: float) -> None:
        set_lr(self.engine.optimizer, lr)

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Collective: `safe_get_full_fp32_param` needs an all-reduce over the data ranks for each parameter."""
        get = self.deepspeed.utils.safe_get_full_fp32_param
        return self.full(lambda p: p.detach() if (full := get(p)) is None else full)

    def full_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Collective. Call it from `on_gradients` only, because DeepSpeed's update frees the gradients."""
        return self.full(self.deepspeed.utils.safe_get_full_grad)

    def full(self, of: Callable[[torch.nn.Parameter], Tensor | None]) -> Iterator[tuple[str, Tensor]]:
        """`ShardedState.full` of tensors that DeepSpeed has gathered over its data ranks."""
        return self.state.full(of)

    def pieces(self) -> Iterator[Piece]:
        """Weights as this rank computes with them, and the moments of the optimiser. With ZeRO, a rank has the moments
        of a flat partition, and gives the part of it that belongs to each parameter. Stage 3 shards weights too, and no
        other data rank holds a copy: of these it gives none."""
        inner = getattr(self.engine.optimizer, "optimizer", self.engine.optimizer)
        for piece in self.state.pieces(self.model, lambda _, p: inner.state.get(p, {})):
            if piece.tensor.numel() > 0:
                yield piece
        for name, p in self.parameters.items():
            if (mapping := getattr(p, "_hp_mapping", None)) is not None:  # private; deepspeed 0.19
                (flat,) = inner.param_groups[mapping.param_group_index]["params"]
                start, length = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
                for kind in saving.MOMENTS:
                    moment = inner.state[flat][kind].narrow(0, start, length)
                    yield Piece(name, kind, (p.numel(),), (mapping.lp_fragment_address.start,), moment)

    def saved(self) -> Iterator[Piece]:
        return saving.saved(self)

    def restore(self, read: Read, known: Container[str]) -> None:
        saving.restore(self, read, known)

    def own_state(self) -> dict[str, Tensor]:
        return {}

    def load_own_state(self, tensors: Mapping[str, Tensor]) -> None:
        return None

    def part_of(self, parameter: torch.nn.Parameter, whole: Tensor) -> Tensor:
        """What this rank computes with of a whole tensor of the parameter's."""
        return whole

    def state_tensors(self) -> dict[str, Iterable[Tensor]]:
        """The tensors by kind. `optimiser` includes the rank's part of the master weights, which DeepSpeed keeps in
        addition to the parameters."""
        optimiser = self.engine.optimizer
        inner = getattr(optimiser, "optimizer", optimiser)
        parameters = list(self._parameters())
        masters = [p for group in inner.param_groups for p in group["params"]]
        masters += getattr(
            optimiser, "fp32_partitioned_groups_flat", []
        )  # stage 3 has them here, because its parameter groups are empty between steps
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
    """The mesh with the interface that DeepSpeed expects of a model-parallel unit (`mpu`). With it, DeepSpeed makes no
    groups of its own."""

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
                # No mean over microbatches (`scale_wrt_gas`): the loss is already divided by the number of all tokens.
                self.engine.backward(summed(loss, self.data_ranks), scale_wrt_gas=False)
            losses.append(loss.detach())
            with span("optimiser"):
                if i == self.num_microbatches:
                    self.gradients_ready()
                self.engine.step()  # it clips and updates after the last microbatch, and only counts the others
        norm = torch.as_tensor(self.engine.get_global_grad_norm(), device=losses[0].device)
        return StepResult(loss=sum_over(torch.stack(losses).sum(), self.mesh, *BATCH_AXES), grad_norm=norm)

    @torch.no_grad()
    def evaluate(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.config.train.micro_batch_size
        losses = []
        self.model.eval()  # no dropout
        for i, (inputs, labels) in enumerate(zip(tokens.split(rows), targets.split(rows), strict=True)):
            with span("F", 0, i):
                losses.append(self.model.loss(self.engine(inputs), labels))
        self.model.train()
        return sum_over(torch.stack(losses).sum(), self.mesh, *BATCH_AXES), count_valid(targets, self.mesh)
