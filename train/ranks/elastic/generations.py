"""The generations of a run: which ranks train together, one group after the other."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import closing

import torch.distributed as dist

from train.config.schema import Config
from train.config.world import World
from train.ranks.distributed import forget_meshes
from train.ranks.elastic.ahead import load_ahead
from train.ranks.elastic.carried import Carried
from train.ranks.elastic.elastic_generation import ElasticGeneration, connected, prefix
from train.ranks.elastic.generation import Generation
from train.ranks.elastic.member import Member, RollLost
from train.ranks.elastic.messages import Start

ADDRESS, COMPLETE = "roll", "complete"  # keys of torchrun's store


def generations(config: Config, world: World) -> Iterator[Generation]:
    """The generations of the run, one after the other. Leave each before the next one is asked for."""
    if world.roll is None:
        yield Generation(config, world)
        return
    store = dist.PrefixStore(prefix(world), connected(world, config.runtime.timeout_s))
    if store.check([COMPLETE]):
        return
    if world.roll:
        store.set(ADDRESS, world.roll)
    load_ahead(config)
    try:
        address, patience_s = store.get(ADDRESS).decode(), config.runtime.timeout_s
        with closing(Member(world.rank, address, lambda: None, patience_s)) as member:
            yield from _elastic(config, world, member, store)
    except RollLost:
        if not store.check([COMPLETE]):  # the others have not finished meanwhile
            raise


def _elastic(config: Config, world: World, member: Member, store: dist.Store) -> Iterator[Generation]:
    carried: Carried | None = None
    before, since = [*range(world.world_size)], time.monotonic()
    while (start := member.next_start(None if carried is None else carried.step)) is not None:
        carried = _brought_up(carried, start, world.rank)
        forget_meshes()
        gc.unfreeze()
        gc.collect()  # the old groups end now, and not while new ones are made
        generation = ElasticGeneration(config, world, member, start, carried, before=before, since=since)
        yield generation
        if generation.complete:
            store.set(COMPLETE, "1")
            member.done()
            return
        carried = generation.carried
        if generation.begun:
            before, since = start.places, generation.ended


def _brought_up(carried: Carried | None, start: Start, place: int) -> Carried | None:
    """What this place carries into the generation that begins: nothing if the roll says that its state is not needed,
    and an update that it has kept, if others have made it."""
    if carried is None or start.steps[start.places.index(place)] is None:
        return None
    if carried.late is not None and start.newest() == carried.step + 1:
        carried.catch_up()
    carried.late = None
    return carried
