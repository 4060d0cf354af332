"""The roll: which places are alive, and which of them train together. It knows no sockets. Torch is not imported.

All decisions are made here, in one process that outlives the ranks, so that ranks do not have to agree among
themselves. A rank that ends closes its connection, whatever ended it, so its end is known at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from train.ranks.elastic.messages import Failed, Finished, Message, Over, Start, Waiting

Mail = list[tuple[int, Message]]  # messages, each with the place that it is for


@dataclass
class Roll:
    """Every method takes what has happened and returns what is to be sent.

    `num_places`: how many places torchrun has started. `members`: the places of the current generation. `lost`: those
    that have ended. `done`: those that have finished. `ready`: places that can begin a generation, with the last step
    that they have made. `failed`: an error ends the run, and no generation begins any more.
    """

    num_places: int
    generation: int = 0
    members: tuple[int, ...] = ()
    lost: set[int] = field(default_factory=set)
    done: set[int] = field(default_factory=set)
    ready: dict[int, int | None] = field(default_factory=dict)
    failed: bool = False

    def is_ready(self, place: int, step: int | None) -> Mail:
        """A place of a generation that is over, or one that has been started again."""
        self.ready[place] = step
        if self.done and place not in self.alive():
            return [(place, Finished())]
        if started := self._start():
            return started
        newcomers = sorted(set(self.ready) - set(self.alive()))
        return [(member, Waiting(newcomers)) for member in self.alive()] if place in newcomers else []

    def has_ended(self, place: int) -> Mail:
        """The place's process has ended, or can no longer be reached."""
        self.ready.pop(place, None)
        if place not in self.alive():
            return []
        self.lost.add(place)
        if self.failed:  # what the others then notice ends the run too
            return []
        over = Over(self.generation, sorted(self.lost))
        return [*((member, over) for member in self.alive()), *self._start()]

    def is_done(self, place: int) -> Mail:
        """The place has trained and written the last step. Nobody can join any more."""
        self.done.add(place)
        newcomers = sorted(set(self.ready) - set(self.alive()))
        return [*((newcomer, Finished()) for newcomer in newcomers), *self._start()]

    def has_failed(self, place: int) -> Mail:
        """The rank has an error of its own, with which its keeper and then torchrun will end."""
        self.failed = True
        return [(member, Failed(place)) for member in self.alive() if member != place]

    def alive(self) -> list[int]:
        """The members of the generation that are still training."""
        return [place for place in self.members if place not in self.lost and place not in self.done]

    def _start(self) -> Mail:
        """Begin a generation if every living member waits for it. Without any state, all places must be there: they
        begin from a checkpoint, or from the beginning."""
        if self.failed or any(place not in self.ready for place in self.alive()):
            return []
        stateless = all(step is None for step in self.ready.values())
        if not self.ready or (stateless and len(self.ready) < self.num_places):
            return []
        places = sorted(self.ready, key=lambda place: (-_known(self.ready[place]), place))
        start = Start(self.generation + 1, places, [self.ready[place] for place in places])
        self.generation, self.members, self.lost, self.ready = start.generation, tuple(places), set(), {}
        return [(place, start) for place in places]


def _known(step: int | None) -> int:
    return -1 if step is None else step
