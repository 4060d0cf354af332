"""The generations of a run: which ranks train together, one group after the other."""

from __future__ import annotations

import dataclasses
import gc
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from train.config.plan import replaced
from train.config.schema import Config
from train.config.strategy import SavesState, StepResult, TrainStep
from train.config.world import World
from train.model.weights import derived_seed
from train.ranks.elastic.ahead import load_ahead
from train.ranks.elastic.carried import Carried, newest, restore
from train.ranks.elastic.generation import Generation
from train.ranks.elastic.member import Member, RollLost
from train.ranks.elastic.messages import Start
from train.ranks.elastic.sockets import Connections
from train.ranks.peers import because_of_a_peer
from train.ranks.side_group import SideGroup

if TYPE_CHECKING:
    from train.measure.metrics import Metrics
    from train.record.report import Report

# While groups are made, gloo tries to connect to a peer until its time-out, even if the peer has ended meanwhile.
CONNECT_S = 30.0
PATIENCE_S = 5.0  # after an error that a lost rank can cause, until the roll says that one is lost
ADDRESS, COMPLETE = "roll", "complete"  # keys of torchrun's store


class ElasticGeneration(Generation):
    """The places in `start` train together. When one of them ends, the others get an error, which ends the context.

    `origin`: the world that torchrun started. `carried`: what this rank has, if it has a state. `before`: the places of
    the previous generation, which ended at the time `since`.
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
        super().__init__(replaced(config, ["strategy", "dp_replicate"], -1), world)
        self.timeout_s = min(self.timeout_s, CONNECT_S)
        self.origin, self.member, self.start, self.carried = origin, member, start, carried
        self.before, self.since = before, since
        self.shared: Carried | None = None  # what rank 0 has, on every rank
        self.train_step: SavesState | None = None  # once it has the state
        self.report: Report | None = None
        self.metrics: Metrics | None = None
        self.leaves = self.complete = False
        self.ended = since

    def __enter__(self) -> Generation:
        self.connections = Connections()
        self.member.interrupt = self.connections.shut_down
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
            self.carried.tensors = {piece.key: piece.tensor for piece in self.train_step.saved()}
            self.carried.report["first_step_s"] = self.report.first_step_s
        self.train_step = self.report = self.metrics = None
        sys.excepthook = self.hook
        return True

    def store(self) -> dist.Store:
        prefix = f"{_prefix(self.origin)}/generation_{self.start.generation}"
        return dist.PrefixStore(prefix, _connected(self.origin, self.config.runtime.timeout_s))

    def newest(self, side_group: SideGroup) -> Carried | None:
        self._allow_time()
        if self.start.steps[0] is not None:  # rank 0 has the newest step
            self.shared = newest(self.carried, side_group)
        return self.shared

    def begin(self, train_step: TrainStep, report: Report, metrics: Metrics, after: int) -> None:
        self._allow_time()
        assert isinstance(train_step, SavesState)
        steps, side_group, shared = self.start.steps, metrics.side_group, self.shared
        if shared is None:
            self.carried = Carried(after, side_group.share_json(report.memo()))
        else:
            restore(train_step, shared, side_group, metrics.device, sends=len(set(steps)) > 1)
            # dropout: from here on masks are a function of the seed, this step and the rank
            torch.manual_seed(derived_seed(self.config.train.seed, "dropout", shared.step, self.world.rank))
            self.carried = dataclasses.replace(shared, tensors={}, made={**shared.made})
            shared.tensors.clear()  # somebody may keep `shared`, and these are as large as the new ones
        self.connections.complete()
        self.train_step, self.report, self.metrics = train_step, report, metrics
        if self.world.rank == 0 and set(self.before) != set(self.start.places):
            print(self._says(self.carried.step), flush=True)

    def made(self, step: int, result: StepResult, lr: float) -> None:
        assert self.carried is not None
        self.carried.add(step, result, lr)

    def changes(self, step: int) -> bool:
        assert self.metrics is not None
        if step % (self.config.checkpoint.every or 1) or step == self.config.train.steps:
            return False
        self.leaves = self.metrics.side_group.share_json(bool(self.member.waiting))
        if self.leaves:
            self.metrics.flush()
        return self.leaves

    def end(self) -> None:
        assert self.metrics is not None
        self.metrics.side_group.barrier()
        self.complete = True

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


def generations(config: Config, world: World) -> Iterator[Generation]:
    """The generations of the run, one after the other. Leave each before the next one is asked for."""
    if world.roll is None:
        yield Generation(config, world)
        return
    store = dist.PrefixStore(_prefix(world), _connected(world, config.runtime.timeout_s))
    if store.check([COMPLETE]):
        return
    if world.roll:
        store.set(ADDRESS, world.roll)
    load_ahead(config)
    try:
        with closing(Member(world.rank, store.get(ADDRESS).decode(), lambda: None)) as member:
            yield from _elastic(config, world, member, store)
    except RollLost:
        if not store.check([COMPLETE]):  # the others have not finished meanwhile
            raise


def _elastic(config: Config, world: World, member: Member, store: dist.Store) -> Iterator[Generation]:
    carried: Carried | None = None
    before, since = [*range(world.world_size)], time.monotonic()
    while (start := member.next_start(None if carried is None else carried.step)) is not None:
        generation = ElasticGeneration(config, world, member, start, carried, before=before, since=since)
        yield generation
        if generation.complete:
            store.set(COMPLETE, "1")
            member.done()
            return
        carried, before, since = generation.carried, start.places, generation.ended
        gc.collect()  # the old groups end now, and not while new ones are made


def _prefix(world: World) -> str:
    return f"elastic_{world.restarts_done}"


def _connected(world: World, timeout_s: float) -> dist.Store:
    """A connection to torchrun's store, which lives as long as torchrun."""
    assert world.store is not None, "a keeper starts a rank only under torchrun"
    host, port = world.store
    return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)


def _ranks(places: Sequence[int]) -> str:
    return f"rank{'s' if len(places) > 1 else ''} {', '.join(map(str, places))}"
