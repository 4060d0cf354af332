"""What the roll and the ranks say to each other: one line of JSON for each message. Torch is not imported."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass


@dataclass(frozen=True)
class Ready:
    """From a rank: it can begin a generation. `step`: the last step whose update it has made; None if it has no
    state."""

    place: int
    step: int | None


@dataclass(frozen=True)
class Done:
    """From a rank: the last step is complete and written."""

    place: int


@dataclass(frozen=True)
class Failed:
    """From a rank, and then from the roll to the others: it has an error of its own, which ends the whole run."""

    place: int


@dataclass(frozen=True)
class Start:
    """From the roll: a generation begins. `places`: who is in it, in the order of their ranks; a place with the newest
    step is first. `steps`: the last step of each whose state counts; None for the others, which get a state."""

    generation: int
    places: list[int]
    steps: list[int | None]

    def newest(self) -> int | None:
        """The newest step of a place; None if no place has a state."""
        return max((step for step in self.steps if step is not None), default=None)


@dataclass(frozen=True)
class Over:
    """From the roll: places of this generation have ended, so that it is over."""

    generation: int
    lost: list[int]


@dataclass(frozen=True)
class Waiting:
    """From the roll: these places are ready, and wait until the generation lets them in."""

    places: list[int]


@dataclass(frozen=True)
class Finished:
    """From the roll, to a place that wants to come back: the run is complete."""


Message = Ready | Done | Failed | Start | Over | Waiting | Finished
KINDS: dict[str, type[Message]] = {
    kind.__name__: kind for kind in (Ready, Done, Failed, Start, Over, Waiting, Finished)
}


def encoded(message: Message) -> bytes:
    """The message as a line."""
    return json.dumps({"kind": type(message).__name__, **dataclasses.asdict(message)}).encode() + b"\n"


def decoded(line: bytes) -> Message:
    """The message of a line. Raises ValueError if it is none."""
    try:
        values = json.loads(line)
        return KINDS[values.pop("kind")](**values)
    except (AttributeError, KeyError, RecursionError, TypeError) as error:
        raise ValueError(f"{line!r} is not a message of a roll") from error
