"""A generation as the training loop sees it. Without `runtime.elastic` a run has one, which does nothing."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from train.config.schema import Config
from train.config.strategy import StepResult, TrainStep
from train.config.world import World
from train.ranks.elastic.carried import Carried
from train.ranks.side_group import SideGroup

if TYPE_CHECKING:
    from train.measure.metrics import Metrics
    from train.record.report import Report


class Generation:
    """The time in which a world does not change: a context manager around it. This one is a whole run: nobody is lost.

    `world`, `config`: those of this generation. `timeout_s`: with which groups are made.
    """

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world, self.timeout_s = config, world, config.runtime.timeout_s

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return None

    def store(self) -> dist.Store | None:
        """Where the processes of this world find each other; None: where torch looks itself."""
        return None

    def close(self) -> None:
        """Close the groups of this world."""
        dist.destroy_process_group()

    def newest(self, side_group: SideGroup, mesh: DeviceMesh) -> Carried | None:
        """What the ranks of this world have in memory of the run; None if nobody has anything. Call it before the
        groups of the mesh are used. Collective."""
        return None

    def begin(self, train_step: TrainStep, mesh: DeviceMesh, report: Report, metrics: Metrics, after: int) -> None:
        """Give a step that was just built the state that the ranks have in memory, which is that after this step.
        Collective."""

    def made(self, step: int, result: StepResult, lr: float) -> None:
        """The update of this step has been made."""

    def changes(self, step: int) -> bool:
        """Whether the generation ends after this step, so that ranks which are back can join. Collective."""
        return False

    def end(self) -> None:
        """The last step has been trained and written. Collective."""
