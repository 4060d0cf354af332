"""The generations of a run. Without `runtime.elastic` there is one, which does nothing."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from train.config.plan import replaced
from train.config.problems import Reported
from train.config.schema import Config
from train.config.strategy import TrainStep
from train.config.world import World
from train.model.weights import derived_seed
from train.ranks.elastic.carried import Carried, equalised, put_into, tensors_of
from train.ranks.elastic.member import Member, RollLost
from train.ranks.elastic.messages import Start
from train.ranks.elastic.sockets import Connections
from train.ranks.side_group import SideGroup

if TYPE_CHECKING:
    from train.step import Step

# While groups are made, gloo tries to connect to a peer until its time-out, even if the peer has ended meanwhile.
CONNECT_S = 30.0
PATIENCE_S = 5.0  # after an error, until the roll says that a place has ended
ADDRESS, COMPLETE = "roll", "complete"  # keys of torchrun's store


class Generation:
    """The time in which a world does not change: a context manager around it. This one is a whole run: nobody is lost.

    `world`, `config`: those of this generation. `origin`: the world that torchrun started. `carried`: the state that
    this rank has; None until it has one.
    """

    def __init__(self, config: Config, world: World, origin: World | None = None) -> None:
        self.config, self.world, self.origin = config, world, origin or world
        self.timeout_s = config.runtime.timeout_s  # with which groups are made
        self.carried: Carried | None = None
        self.complete = False

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return None

    def store(self) -> dist.Store | None:
        """Where the processes of this world find each other; None: where torch looks itself."""
        return None

    def begin(self, train_step: TrainStep, side_group: SideGroup, device: torch.device) -> Carried:
        """Give a step that was just built the newest state of the world, and return it without its tensors.
        Collective."""
        self.carried = Carried()
        return self.carried

    def made(self, step: int, figures: Mapping[str, Tensor | float]) -> None:
        """The update of this step has been made. `figures`: its results, by tag."""

    def changes(self, step: int) -> bool:
        """Whether the generation ends after this step, so that places which are back can join. Collective."""
        return False

    def end(self) -> None:
        """The last step has been trained and written. Collective."""
        self.complete = True


class ElasticGeneration(Generation):
    """The places in `start` train together. When one of them ends, the others get an error, which ends the context.

    `before`: the places of the previous generation, which ended at the time `since`.
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
        rank = start.places.index(origin.rank)
        world = dataclasses.replace(origin, rank=rank, world_size=len(start.places))
        super().__init__(replaced(config, ["strategy", "dp_replicate"], -1), world, origin)
        self.timeout_s = min(self.timeout_s, CONNECT_S)
        self.member, self.start, self.carried = member, start, carried
        self.before, self.since = before, since
        self.train_step: Step | None = None  # once it has the state
        self.side_group: SideGroup | None = None
        self.leaves, self.ended = False, since

    def __enter__(self) -> Generation:
        self.connections = Connections()
        self.member.interrupt = self.connections.shut_down
        # a group that could not be made has used up a name (torch 2.11 to 2.13), and names must agree
        distributed_c10d._world.group_count = 0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        """Keep the state. An error that a lost place has caused ends here."""
        self.ended = time.monotonic()
        if error is not None and not self._explained(error):
            self.member.failed()
            return False
        if self.train_step is not None and self.carried is not None:
            self.carried.tensors = tensors_of(self.train_step)
        self.train_step = self.side_group = None
        return True

    def store(self) -> dist.Store:
        prefix = f"elastic_{self.origin.attempt}/generation_{self.start.generation}"
        return dist.PrefixStore(prefix, connected(self.origin, self.config.runtime.timeout_s))

    def begin(self, train_step: TrainStep, side_group: SideGroup, device: torch.device) -> Carried:
        for group in distributed_c10d._world.pg_map:
            distributed_c10d._set_pg_timeout(timedelta(seconds=self.config.runtime.timeout_s), group)
        steps, step = self.start.steps, cast("Step", train_step)
        if steps[0] is None:  # rank 0 has the newest state, so nobody has one
            self.carried = Carried()
        else:
            self.carried = equalised(self.carried or Carried(), side_group, device, sends=len(set(steps)) > 1)
            put_into(step, self.carried.tensors)
            self.carried.tensors = {}
            # dropout: from here on masks are a function of the seed, this step and the rank
            torch.manual_seed(derived_seed(self.config.train.seed, "dropout", self.carried.step, self.world.rank))
        self.connections.complete()
        self.train_step, self.side_group = step, side_group
        if self.world.rank == 0 and set(self.before) != set(self.start.places):
            print(self._says(self.carried.step), flush=True)
        return self.carried

    def made(self, step: int, figures: Mapping[str, Tensor | float]) -> None:
        assert self.carried is not None
        self.carried.made(step, {tag: float(value) for tag, value in figures.items()})

    def changes(self, step: int) -> bool:
        every, last = self.config.runtime.rejoin_every, self.config.train.steps
        if step % every or step == last:
            return False
        assert self.side_group is not None
        self.leaves = self.side_group.decide(bool(self.member.waiting))
        return self.leaves

    def end(self) -> None:
        assert self.side_group is not None
        self.side_group.barrier()
        super().end()

    def _explained(self, error: BaseException) -> bool:
        """Whether the error is one that the others' end or leave can cause. One that this rank reports is its own."""
        if not isinstance(error, Exception) or isinstance(error, Reported):
            return False
        return self.leaves or self.complete or self.member.is_over(PATIENCE_S)

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
    store = dist.PrefixStore(f"elastic_{world.attempt}", connected(world, config.runtime.timeout_s))
    if store.check([COMPLETE]):
        return
    if world.roll:
        store.set(ADDRESS, world.roll)
    try:
        with closing(Member(world.rank, store.get(ADDRESS).decode(), lambda: None)) as member:
            yield from _elastic(config, world, member, store)
    except (ConnectionError, RollLost):
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


def connected(world: World, timeout_s: float) -> dist.Store:
    """A connection to torchrun's store, which lives as long as torchrun."""
    assert world.store is not None, "a keeper starts a rank only under torchrun"
    host, port = world.store
    return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)


def _ranks(places: Sequence[int]) -> str:
    return f"rank{'s' if len(places) > 1 else ''} {', '.join(map(str, places))}"
