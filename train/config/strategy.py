"""The one abstraction: a strategy turns a model into a `TrainStep`; nothing else asks which strategy runs.

What one technique must know of another, such as whether FSDP is used, it asks of the strategy (the second half of
`Strategy`), so that no technique's folder imports another's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol

from omegaconf import MISSING

from train.config.fields import key

if TYPE_CHECKING:  # this file is read to check a command line: torch would cost two seconds
    import torch
    from torch.distributed.device_mesh import DeviceMesh

    from train.config.schema import Config, ModelConfig
    from train.model.transformer import Transformer
    from train.strategies.pipeline.timetable import Action

# Outer to inner: the innermost axis has neighbouring ranks, which share the fastest links.
MESH_AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
# Ranks that differ only in these axes read different rows of the global batch.
BATCH_AXES = ("dp_replicate", "dp_shard")
# A rank's loss is one term of the sum over these: it has other rows, other tokens of the same rows, or other layers.
LOSS_AXES = ("pp", *BATCH_AXES, "cp")


@dataclass
class StepResult:
    """Device tensors, the same on every rank. `loss`: mean over the global batch's valid tokens, before the update.
    `grad_norm`: global 2-norm of the gradient, before clipping."""

    loss: torch.Tensor
    grad_norm: torch.Tensor
    extras: dict[str, torch.Tensor] = field(default_factory=dict)  # more scalars to log, by tag


class TrainStep(Protocol):
    """One optimiser step over this rank's rows of the global batch, whatever the strategy."""

    on_gradients: Callable[[], None] | None  # called after backward and every reduction, before clipping and update

    def __call__(self, tokens: torch.Tensor, targets: torch.Tensor, *, lr: float) -> StepResult: ...

    def evaluate(self, tokens: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum of token losses, number of valid tokens) over the global batch, the same on every rank."""
        ...

    def full_parameters(self) -> Iterator[tuple[str, torch.Tensor]]: ...

    def full_gradients(self) -> Iterator[tuple[str, torch.Tensor]]: ...

    def state_tensors(self) -> dict[str, Iterable[torch.Tensor]]:
        """The tensors behind `state_bytes` that there are now, under the same names: gradients from `on_gradients`."""
        ...

    def state_bytes(self) -> dict[str, int]:
        """Bytes that this rank holds: `parameters`, `gradients` (at the end of backward) and `optimiser`."""
        ...


@dataclass(frozen=True)
class Order:
    """A pipeline schedule: `rows[rank]`, the actions (timetable.py) of a rank of `pp` in order, and the bubble that a
    formula gives it, if there is one."""

    rows: list[list[Action]]
    num_stages: int
    closed_form: float | None


@dataclass(frozen=True)
class Lossy:
    """Gradients lose digits on the way. `bound`: of the errors that this makes in the proof; None: none is known."""

    option: str
    bound: float | None

    def __str__(self) -> str:
        within = f": within {self.bound:.0e} of one device" if self.bound else ""
        return f"{self.option} loses digits of gradients on the way{within}"


@dataclass
class Strategy(ABC):
    """A parallel layout. Its fields are the keys under `strategy` in the config; those that are named as an axis of
    the mesh are its degree, None where the strategy does not use it, -1 for the ranks that are left."""

    name: str = key(MISSING, "The name of the preset, with which the name of a run's folder begins.")
    extra: ClassVar[str | None] = None  # the optional package that it needs, which is also the extra's name
    closed_form: ClassVar[bool] = False  # whether shapes.py and communication.py know what it holds and sends

    def mesh_axes(self) -> dict[str, int]:
        """Degree of each axis that this strategy uses, at degree 1 too; -1 means the ranks that are left."""
        return {axis: degree for axis in MESH_AXES if (degree := getattr(self, axis, None)) is not None}

    def differs(self) -> dict[str, str]:
        """The columns of the proof (proof.py) that are *expected* not to equal one device's, each with its reason.

        What is not named here must be equal. Said wherever the strategy is explained, proven or run.
        """
        return {}

    def lossy(self) -> Lossy | None:
        """What is sent with fewer digits than it has: near one device's, not equal. None: nothing is."""
        return None

    def needed_backend(self) -> tuple[str, str] | None:
        """(the only torch.distributed backend that can do it, the option that needs it), or None: any can."""
        return None

    @abstractmethod
    def build(self, model: Transformer, mesh: DeviceMesh, config: Config) -> TrainStep:
        """Apply the strategy to a model on the meta device. Collective: all ranks of the mesh call it."""

    # of data parallelism

    def uses_ddp(self) -> bool:
        return False

    def uses_fsdp(self) -> bool:
        return False

    def frees_parameters(self) -> bool:
        """Whether FSDP frees a block's gathered parameters between its forward and its backward."""
        return False

    def reduces_once(self) -> bool:
        """Whether FSDP adds up the gradients of all microbatches and reduces them after the last one, as ZeRO-1."""
        return False

    # of tensor and expert parallelism

    def shards_sequence(self) -> bool:
        """Whether activations between blocks are sharded over the sequence along `tp`."""
        return False

    def shards_logits(self) -> bool:
        """Whether logits are left sharded over the vocabulary along `tp`."""
        return False

    def expert_degree(self) -> int | None:
        """The degree of expert parallelism: -1 means all ranks that it folds over, None that it is not used."""
        return None

    # of a pipeline

    def schedule_name(self) -> str | None:
        return None

    def num_chunks(self) -> int:
        """Stages per rank of `pp`."""
        return 1

    def stages_of(self, rank: int, num_ranks: int) -> list[int]:
        """The stages of a rank of `pp`, first to last."""
        return [rank]

    def layers_of(self, model: ModelConfig, seq_len: int, num_ranks: int) -> list[range]:
        """The layers of every stage."""
        return [range(model.num_layers)]

    def splits_backward(self) -> bool:
        """Whether gradients of weights are computed apart from gradients of inputs."""
        return False

    def order(self, num_ranks: int, num_microbatches: int) -> Order | None:
        """The schedule of a pipeline over so many ranks of `pp`; None without one."""
        return None


def folded_ranks(degrees: dict[str, int]) -> int:
    """The ranks that `ep` folds over: those that FSDP shards dense weights over."""
    return degrees["dp_shard"] * degrees["cp"]


def resolve_degrees(axes: dict[str, int], world_size: int) -> dict[str, int]:
    """The degree of every mesh axis, with -1 filled by the ranks that are left (rounded down) and absent axes 1.

    The product is not checked against the world: that is a rule of `validate`.
    """
    degrees = {axis: axes.get(axis, 1) for axis in MESH_AXES}
    fixed = 1
    for degree in degrees.values():
        fixed *= degree if degree > 0 else 1
    return {axis: max(world_size // fixed, 1) if degree == -1 else degree for axis, degree in degrees.items()}
