"""A generation of an elastic run: it ends when one of its ranks ends, or to let in those that are back."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh

from train.config.plan import Plan, replaced
from train.config.schema import Config
from train.config.strategy import BATCH_AXES, StepResult, TrainStep
from train.config.world import World
from train.model.weights import derived_seed
from train.ranks.distributed import own_device, sum_over
from train.ranks.elastic.carried import Carried, GoesOn, Late, newest, restore
from train.ranks.elastic.generation import Generation
from train.ranks.elastic.interrupt import Interrupt
from train.ranks.elastic.member import Member
from train.ranks.elastic.messages import Start
from train.ranks.optim import lr_at
from train.ranks.peers import because_of_a_peer
from train.ranks.side_group import SideGroup

if TYPE_CHECKING:
    from train.measure.metrics import Metrics
    from train.record.report import Report

# While groups are made, gloo tries to connect to a peer until its time-out, even if the peer has ended meanwhile; and
# nccl waits for ever for a peer that has ended, so that the rank must end too.
CONNECT_S = 30.0
PATIENCE_S = 5.0  # after an error that a lost rank can cause, until the roll says that one is lost


class ElasticGeneration(Generation):
    """The places in `start` train together. When one of them ends, the others get an error, which ends the context.

    `origin`: the world that torchrun started. `carried`: what this rank has, if it has a state. `before`: the places of
    the last generation that has begun to train, which ended at the time `since`.
    """

    def __init__(
        self,
        config: Config,
        origin: World,
        member: Member,
        start: Start,
        carried: Carried | None,
        *,
        before: Sequence[int],
        since: float,
    ) -> None:
        world = dataclasses.replace(
            origin,
            rank=start.places.index(origin.rank),
            world_size=len(start.places),
            # as after a restart by torchrun, a generation without any state goes on from the newest checkpoint
            restarts_done=origin.restarts_done + start.generation - 1,
        )
        plan = Plan(config, origin.world_size)
        for axis, degree in (("dp_shard", plan.degrees["dp_shard"]), ("dp_replicate", -1)):
            if axis in plan.axes:
                config = replaced(config, ["strategy", axis], degree)
        super().__init__(config, world)
        self.timeout_s = min(self.timeout_s, CONNECT_S)
        self.origin, self.member, self.start, self.carried = origin, member, start, carried
        self.before, self.since = before, since
        self.shared: Carried | None = None  # what rank 0 has, on every rank
        self.train_step: GoesOn | None = None  # once it has the state
        self.late: Late | None = None
        self.report: Report | None = None
        self.metrics: Metrics | None = None
        self.begun = self.leaves = self.complete = False
        self.ended = since

    def __enter__(self) -> Generation:
        self.interrupt = self.member.interrupt = Interrupt(self.member)
        self.hook = sys.excepthook  # each group of the world adds the rank to it
        # a group that could not be made has used up a name (torch 2.11 to 2.13), and names must agree
        distributed_c10d._world.group_count = 0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        """Keep the state. An error that a lost place has caused ends here."""
        self.ended = time.monotonic()
        if error is not None and not self._explained(error):
            self.member.fail()
            return False
        if not self.complete and (asked := self._signal()):  # which nobody would remember
            self.member.fail()
            raise SystemExit(128 + asked) from None
        if self.train_step is not None and self.carried is not None and self.report is not None:
            self.carried.keep(self.train_step)
            self.carried.late = self.late
            self.carried.report["first_step_s"] = self.report.first_step_s
        self.train_step = self.late = self.report = self.metrics = None
        sys.excepthook = self.hook
        return True

    def store(self) -> dist.Store:
        name = f"{prefix(self.origin)}/generation_{self.start.generation}"
        return dist.PrefixStore(name, connected(self.origin, self.config.runtime.timeout_s))

    def close(self) -> None:
        self.interrupt.abort()  # groups of nccl would wait for ranks that have ended
        super().close()

    def newest(self, side_group: SideGroup, mesh: DeviceMesh) -> Carried | None:
        self._allow_time()
        side_group.barrier()  # one that has ended until now is noticed here
        with self.member.hurried(self.timeout_s):  # nccl connects ranks now, and cannot be interrupted in this
            sum_over(torch.zeros(1, device=own_device(mesh)), mesh, *BATCH_AXES)
            self.interrupt.check()
        if self.start.steps[0] is not None:  # rank 0 has the newest step
            self.shared = newest(self.carried, side_group)
        return self.shared

    def begin(self, train_step: TrainStep, mesh: DeviceMesh, report: Report, metrics: Metrics, after: int) -> None:
        self._allow_time()
        assert isinstance(train_step, GoesOn)
        steps, side_group, shared = self.start.steps, metrics.side_group, self.shared
        votes = mesh["dp_shard"].size() > 1 or dist.get_backend() != "gloo"
        if shared is None:
            self.carried = Carried(after, side_group.share_json(report.memo()))
        else:
            restore(train_step, shared, side_group, mesh, sends=None in steps or (len(set(steps)) > 1 and not votes))
            self.interrupt.check()
            # dropout: from here on masks are a function of the seed, this step and the rank
            torch.manual_seed(derived_seed(self.config.train.seed, "dropout", shared.step, self.world.rank))
            self.carried = dataclasses.replace(shared, tensors={}, made={**shared.made}, unread={})
            shared.tensors.clear()  # somebody may keep `shared`, and these are as large as the new ones
        self.interrupt.connections.complete()
        self.train_step, self.report, self.metrics = train_step, report, metrics
        metrics.check = self.interrupt.check
        train_step.before_update = self._vote if votes else None
        if self.world.rank == 0 and set(self.before) != set(self.start.places):
            print(self._says(self.carried.step), flush=True)
        self.begun = True

    def made(self, step: int, result: StepResult, lr: float) -> None:
        assert self.carried is not None
        self.carried.add(step, result, lr)

    def changes(self, step: int) -> bool:
        assert self.metrics is not None
        if step % (self.config.checkpoint.every or 1) or step == self.config.train.steps:
            return False
        figures = self.metrics.side_group.exchange([len(self.member.waiting), self._signal()])
        # after a signal all ranks save and leave, which they do after the next step
        self.leaves = figures[0][0] > 0 and not any(asked for _, asked in figures)
        if self.leaves:
            self.metrics.flush()
            self._meet()
        return self.leaves

    def end(self) -> None:
        self._meet()
        self.complete = True

    def _meet(self) -> None:
        """Return when no device waits for this rank any more."""
        assert self.metrics is not None
        self.interrupt.check()
        self.metrics.side_group.barrier()

    def _vote(self, change: Callable[[], StepResult]) -> None:
        """Return when the gradients of all ranks are complete. If a rank ends meanwhile, the others may have noticed
        nothing, and may make the update; so this one then keeps the function that makes it."""
        assert self.carried is not None and self.train_step is not None and self.metrics is not None
        self.interrupt.check()
        lr = lr_at(self.carried.step + 1, self.config.train.steps, self.config.optim)
        self.late = Late(self.train_step, change, lr)
        self.metrics.side_group.barrier()
        self.late = None

    def _allow_time(self) -> None:
        """The groups that exist now have been made, so that they wait as long as the config allows."""
        for group in distributed_c10d._world.pg_map:
            distributed_c10d._set_pg_timeout(timedelta(seconds=self.config.runtime.timeout_s), group)

    def _explained(self, error: BaseException) -> bool:
        """Whether the error is one that the others' end or leave can cause."""
        if not isinstance(error, Exception):
            return False
        patience_s = PATIENCE_S if because_of_a_peer(error) else 0
        return self.leaves or self.complete or self.member.is_over(patience_s)

    def _signal(self) -> int:
        """The number of a signal that asks this rank to leave; 0 if there is none."""
        return self.metrics.signals.number if self.metrics is not None and self.metrics.signals is not None else 0

    def _says(self, step: int) -> str:
        lost = sorted(set(self.before) - set(self.start.places))
        back = sorted(set(self.start.places) - set(self.before))
        told = [f"{_ranks(places)} {verb}" for places, verb in ((lost, "lost"), (back, "back")) if places]
        size, seconds = f"{self.world.world_size} of {self.origin.world_size}", time.monotonic() - self.since
        return f"{' and '.join(told)} after step {step}: {size} ranks go on with step {step + 1} ({seconds:.1f} s)"


def prefix(world: World) -> str:
    """Of the keys in torchrun's store, which are those of this start of all ranks."""
    return f"elastic_{world.restarts_done}"


def connected(world: World, timeout_s: float) -> dist.Store:
    """A connection to torchrun's store, which lives as long as torchrun."""
    assert world.store is not None, "a keeper starts a rank only under torchrun"
    host, port = world.store
    return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)


def _ranks(places: Sequence[int]) -> str:
    return f"rank{'s' if len(places) > 1 else ''} {', '.join(map(str, places))}"
