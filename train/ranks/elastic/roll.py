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

    `num_places`: how many places torchrun has started. `unit`: how many places, one after the other, hold the whole
    state together; only whole units train, and a unit has a state if all of its places have one. `members`: the places
    of the current generation. `lost`: those that have ended. `done`: those that have finished. `ready`: places that can
    begin a generation, with the last step that they have made. `failed`: an error ends the run, and no generation
    begins any more.
    """

    num_places: int
    unit: int = 1
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
        newcomers = [one for unit in self._whole_units() for one in unit if one not in self.alive()]
        training = [member for member in self.alive() if member not in self.ready]
        return [(member, Waiting(newcomers)) for member in training] if place in newcomers else []

    def has_ended(self, place: int) -> Mail:
        """The place's process has ended, or can no longer be reached."""
        self.ready.pop(place, None)
        if place not in self.alive():
            return []
        self.lost.add(place)
        over = Over(self.generation, sorted(self.lost))  # also after an error: what the others notice ends the run too
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

    def _whole_units(self) -> list[range]:
        """The units whose places are all ready, from the one with the newest step to those without a state."""
        firsts = range(0, self.num_places, self.unit)
        units = [range(first, first + self.unit) for first in firsts]
        whole = [unit for unit in units if all(place in self.ready for place in unit)]
        return sorted(whole, key=lambda unit: (-max(self._steps(unit), default=-1), unit.start))

    def _steps(self, unit: range) -> list[int]:
        """The steps of its places; empty if a place has no state, as the others' parts are of no use without it."""
        steps = [step for place in unit if (step := self.ready.get(place)) is not None]
        return steps if len(steps) == len(unit) else []

    def _start(self) -> Mail:
        """Begin a generation of all whole units if every living member waits for it. If no unit has a state, all places
        must be there: they begin from a checkpoint, or from the beginning."""
        if self.failed or not self.ready or any(place not in self.ready for place in self.alive()):
            return []
        units = self._whole_units()
        if not any(map(self._steps, units)):
            if self.done:  # the state is no more, but nothing is left to be done either
                return [(place, Finished()) for place in sorted(self.ready)]
            if len(self.ready) < self.num_places:
                return []
        places = [place for unit in units for place in unit]
        steps = [self.ready[place] if self._steps(unit) else None for unit in units for place in unit]
        start = Start(self.generation + 1, places, steps)
        # what the others still have will be too old when their units are whole again
        self.ready = {place: None for place in self.ready if place not in places}
        self.generation, self.members, self.lost = start.generation, tuple(places), set()
        return [(place, start) for place in places]
