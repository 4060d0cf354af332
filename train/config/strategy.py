"""The one abstraction: a strategy turns a model into a `TrainStep`. No other code depends on which strategy runs.

The second half of `Strategy` answers what one technique must know about another, such as whether FSDP is used. So no
two techniques' folders import each other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

from omegaconf import MISSING

from train.config.fields import key

if TYPE_CHECKING:  # this file is imported to check a command line, and importing torch would take two seconds
    import torch
    from torch.distributed.device_mesh import DeviceMesh

    from train.config.schema import Config, ModelConfig
    from train.model.transformer import Transformer
    from train.ranks.state import Piece
    from train.strategies.pipeline.timetable import Action

# From outer to inner: ranks along the innermost axis are neighbours, which share the fastest links.
MESH_AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
# Ranks that differ only in these axes read different rows of the global batch.
BATCH_AXES = ("dp_replicate", "dp_shard")
# The loss is the sum of the ranks' losses over these axes: ranks along them have different rows, different tokens of
# the same rows, or different layers.
LOSS_AXES = ("pp", *BATCH_AXES, "cp")


@dataclass
class StepResult:
    """Device tensors with the same values on every rank. `loss`: the mean over the global batch's valid tokens, before
    the update. `grad_norm`: the global 2-norm of the gradient, before clipping."""

    loss: torch.Tensor
    grad_norm: torch.Tensor
    extras: dict[str, torch.Tensor] = field(default_factory=dict)  # more scalars to log, by tag


# It fills the tensors of these pieces from a checkpoint.
Read = Callable[[Iterable["Piece"]], None]


class TrainStep(Protocol):
    """One optimiser step over this rank's rows of the global batch, whatever the strategy."""

    on_gradients: Callable[[], None] | None  # called after backward and every reduction, before clipping and update
    # By how much the gradients inside the model are larger than one device's until they are reduced: 1 where ranks'
    # gradients are summed, and the number of ranks where they are averaged.
    gradient_scale: float

    def __call__(self, tokens: torch.Tensor, targets: torch.Tensor, *, lr: float) -> StepResult: ...

    def evaluate(self, tokens: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum of token losses, number of valid tokens) over the global batch, the same on every rank."""
        ...

    def full_parameters(self) -> Iterator[tuple[str, torch.Tensor]]: ...

    def full_gradients(self) -> Iterator[tuple[str, torch.Tensor]]: ...

    def pieces(self) -> Iterator[Piece]:
        """The parts of parameters, buffers and optimiser states that this rank holds between steps. The proof compares
        the copies that several ranks hold. Collective."""
        ...

    def state_tensors(self) -> dict[str, Iterable[torch.Tensor]]:
        """The tensors that `state_bytes` counts, under the same names, as far as they exist now: gradients exist from
        `on_gradients` on."""
        ...

    def state_bytes(self) -> dict[str, int]:
        """Bytes that this rank holds: `parameters`, `gradients` (at the end of backward) and `optimiser`."""
        ...


@runtime_checkable
class SavesState(Protocol):
    """What a `TrainStep` has if it can be saved. A run of a step without it saves no checkpoints, and says so."""

    def saved(self) -> Iterator[Piece]:
        """What this rank gives to a checkpoint, with global names, so that any other layout can read it. Collective."""
        ...

    def restore(self, read: Read, known: Container[str]) -> None:
        """Fill the state from a checkpoint by `read`. `known`: the keys that the checkpoint has. Call it before the
        first step. Collective."""
        ...

    def own_state(self) -> dict[str, torch.Tensor]:
        """What only this rank has and only the same layout can read, as the state of a communication hook."""
        ...

    def load_own_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replace it by what `own_state` returned on this rank; empty: by the state before the first step."""
        ...


@dataclass(frozen=True)
class Order:
    """A pipeline schedule. `rows[rank]`: the actions (timetable.py) of a rank of `pp`, in order. `closed_form`: the
    bubble by a formula, or None if there is no formula for it."""

    rows: list[list[Action]]
    num_stages: int
    closed_form: float | None


@dataclass(frozen=True)
class Lossy:
    """An option by which gradients lose precision when they are sent. `bound`: the largest error that the proof allows
    for it; None if no bound is known."""

    option: str
    bound: float | None

    def __str__(self) -> str:
        within = f": within {self.bound:.0e} of one device" if self.bound else ""
        return f"{self.option} rounds gradients before they are sent{within}"


@dataclass
class Strategy(ABC):
    """A parallel layout. Its fields are the keys under `strategy` in the config. A field with the name of a mesh axis
    is the degree of that axis: None if the strategy does not use the axis, -1 for all ranks that are left."""

    name: str = key(MISSING, "The name of the preset, with which the name of a run's folder begins.")
    extra: ClassVar[str | None] = None  # the optional package that it needs; pip's extra has the same name
    closed_form: ClassVar[bool] = False  # whether the lab computes from formulas what it holds and sends

    def mesh_axes(self) -> dict[str, int]:
        """The degree of each axis that this strategy names, even if it is 1; -1 means all ranks that are left."""
        return {axis: getattr(self, axis) for axis in MESH_AXES if self.names(axis)}

    def names(self, axis: str) -> bool:
        """Whether the strategy names this axis of the mesh, even at degree 1."""
        return getattr(self, axis, None) is not None

    def differs(self) -> dict[str, str]:
        """The columns of the proof that are *expected* to differ from one device's values, each with its reason.

        All other columns must be equal. launch.explain, the proof and the run itself show this.
        """
        return {}

    def meets_every(self) -> int:
        """After every so many optimiser steps all copies of a weight are equal: 1, unless replicas train alone between
        meetings."""
        return 1

    def lossy(self) -> Lossy | None:
        """The option by which gradients are sent with less precision, so that results are only close to one device's.
        None: there is no such option."""
        return None

    def lossy_bound(self) -> float:
        """The largest error that the proof allows for a lossy option; 0 without one, and if no bound is known."""
        lossy = self.lossy()
        return (lossy and lossy.bound) or 0.0

    def needed_backend(self) -> tuple[str, str] | None:
        """(the torch.distributed backend that it needs, the option that needs it); None: every backend works."""
        return None

    @abstractmethod
    def build(self, model: Transformer, mesh: DeviceMesh, config: Config) -> TrainStep:
        """Apply the strategy to a model on the meta device. This is collective: all ranks of the mesh must call it."""

    # What other code asks about data parallelism

    def uses_ddp(self) -> bool:
        return False

    def keeps_errors(self) -> bool:
        """Whether each rank keeps what the compression of gradients has left out: a number for each parameter."""
        return False

    def uses_fsdp(self) -> bool:
        return False

    def frees_parameters(self) -> bool:
        """Whether FSDP frees a block's gathered parameters between its forward and its backward."""
        return False

    def reduces_once(self) -> bool:
        """Whether FSDP adds up the gradients of all microbatches and reduces them after the last one, as ZeRO-1."""
        return False

    # ... about tensor and expert parallelism

    def shards_sequence(self) -> bool:
        """Whether activations between blocks are sharded over the tokens along `tp`."""
        return False

    def shards_logits(self) -> bool:
        """Whether logits are left sharded over the vocabulary along `tp`."""
        return False

    def expert_degree(self) -> int | None:
        """The degree of expert parallelism. -1 means all ranks that it folds over; None means that it is not used."""
        return None

    # ... about a pipeline

    def schedule_name(self) -> str | None:
        return None

    def num_chunks(self) -> int:
        """The number of stages per rank of `pp`."""
        return 1

    def stages_of(self, rank: int, num_ranks: int) -> list[int]:
        """The stages of a rank of `pp`, from first to last."""
        return [rank]

    def layers_of(self, model: ModelConfig, seq_len: int, num_ranks: int) -> list[range]:
        """The layers of every stage."""
        return [range(model.num_layers)]

    def splits_backward(self) -> bool:
        """Whether the gradients of weights and of inputs are computed at different times."""
        return False

    def order(self, num_ranks: int, num_microbatches: int) -> Order | None:
        """The schedule of a pipeline with this many ranks of `pp`; None if the strategy has no pipeline."""
        return None


def folded_ranks(degrees: dict[str, int]) -> int:
    """The ranks that `ep` folds over: those that FSDP shards dense weights over."""
    return degrees["dp_shard"] * degrees["cp"]


def resolve_degrees(axes: dict[str, int], world_size: int) -> dict[str, int]:
    """The degree of every mesh axis. -1 becomes the number of ranks that are left, rounded down; an axis that is not
    named has degree 1.

    Whether the product equals the size of the world is not checked here: that is a rule of `validate`.
    """
    degrees = {axis: axes.get(axis, 1) for axis in MESH_AXES}
    fixed = 1
    for degree in degrees.values():
        fixed *= degree if degree > 0 else 1
    return {axis: max(world_size // fixed, 1) if degree == -1 else degree for axis, degree in degrees.items()}
