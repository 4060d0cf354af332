"""The moments of a step at which a rank may need the most, in the order of its forwards and backwards."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

from train.command.planning.memory.orders import order
from train.command.planning.memory.stages import Stage, plus
from train.command.planning.memory.state import updating
from train.command.planning.memory.tape import GRADIENTS, TEMPORARY, UNSHARDED, Kinds
from train.config.plan import Plan
from train.config.technique import Rank
from train.strategies.data.keys import FsdpKeys

WHOLE = (("F", 0), ("B", 0))  # a microbatch without a pipeline
ENOUGH = 3  # microbatches that show every moment of a strategy without a pipeline


@dataclass
class Progress:
    """`alive`: how many microbatches of each stage wait for their backward. `split`: those whose inputs' gradients are
    computed, and whose weights' gradients are not. `entered`, `begun`: stages that have run a forward, and that have
    gradients. `stayed`: those whose last action was a backward, after which a schedule keeps what is gathered."""

    alive: dict[int, int]
    split: dict[int, int]
    entered: set[int] = field(default_factory=set)
    begun: set[int] = field(default_factory=set)
    stayed: set[int] = field(default_factory=set)

    def copy(self) -> Progress:
        return Progress(dict(self.alive), dict(self.split), set(self.entered), set(self.begun), set(self.stayed))

    def waits_no_more(self, other: Progress) -> bool:
        """Whether, for every stage, at most as many microbatches wait here as there."""
        alive, split = other.alive, other.split
        return all(n <= alive[i] for i, n in self.alive.items()) and all(n <= split[i] for i, n in self.split.items())

    def leave(self, kind: str, stage: int) -> None:
        """Take the microbatch of an action out of those that wait."""
        if kind in ("B", "I"):
            self.alive[stage] -= 1
        if kind == "W":
            self.split[stage] -= 1

    def enter(self, kind: str, stage: int) -> None:
        """Count what the action leaves behind."""
        if kind == "F":
            self.alive[stage] += 1
            self.entered.add(stage)
            self.stayed.discard(stage)
        if kind == "I":
            self.split[stage] += 1
        if kind in ("B", "W"):
            self.begun.add(stage)
            self.stayed.add(stage)


class At(NamedTuple):
    """An action's kind and stage, and how far the step is when it runs. `last`: whether it is the last backward without
    a pipeline, which frees parameters as it goes."""

    kind: str
    stage: int
    progress: Progress
    last: bool


def moments(here: Rank, stages: Mapping[int, Stage], held: Kinds) -> Iterator[Kinds]:
    """Bytes by kind. `held`: what the rank holds between steps; its gradients are those after a step, and a moment may
    have fewer."""
    plan, gradients = here.plan, held[GRADIENTS]
    for at in fullest(here, stages):
        begun = at.progress.begun
        had = already(plan, stages, begun, gradients)
        rest = plus(held, *waiting(stages, at.progress), had, others(stages, at.stage), sent(stages, begun))
        yield from (plus(rest, moment) for moment in of_action(plan, stages[at.stage], at))
    yield plus(held, already(plan, stages, set(stages), gradients))
    if plan.config.strategy.reduces_once() and plan.num_microbatches > 1:
        reducing = sum(one.gathered.last_reduction() for one in stages.values() if one.gathered)
        yield plus(held, {UNSHARDED: reducing, GRADIENTS: -gradients})
    yield plus(held, {TEMPORARY: updating(here)})


def fullest(here: Rank, stages: Mapping[int, Stage]) -> Iterator[At]:
    """For each action that differs from others not only by what waits: the one at which the most waits."""
    plan, strategy = here.plan, here.plan.config.strategy
    kept = {number: sum(stage.kept.values()) for number, stage in stages.items()}
    stashed = {number: sum(stage.stashed.values()) for number, stage in stages.items()}

    def waits(at: At) -> float:
        alive, split = at.progress.alive, at.progress.split
        return sum(kept[i] * n for i, n in alive.items()) + sum(stashed[i] * n for i, n in split.items())

    found = with_most_waiting(
        strategy.schedule_name(), plan.num_microbatches, plan.degrees["pp"], strategy.num_chunks(), here.place["pp"]
    )
    return (max(alike, key=waits) for alike in found)


@cache  # many layouts of a search have the same order
def with_most_waiting(
    name: str | None, microbatches: int, ranks: int, chunks: int, place: int
) -> tuple[tuple[At, ...], ...]:
    """For each action that differs from others not only by what waits: the states that can be the fullest. A state is
    left out if at another one at least as many microbatches of every stage wait; what a microbatch holds is never
    negative. Which of the others is the fullest depends on the bytes of a microbatch.

    `name`: of the schedule, None without a pipeline. `ranks`, `place`: of `pp`. `chunks`: stages of a rank. Do not
    change the result: it is cached.
    """
    actions = order(name, ranks, chunks, microbatches, place) if name else WHOLE * min(microbatches, ENOUGH)
    numbers = {stage for _, stage in actions}
    progress = Progress(dict.fromkeys(numbers, 0), dict.fromkeys(numbers, 0))
    backwards = 0
    found: dict[Hashable, list[At]] = {}
    for action in actions:
        kind, number = step_of(*action)
        if not kind:
            continue
        progress.leave(kind, number)
        backwards += kind == "B"
        last = kind == "B" and not name and backwards == microbatches
        here_before = number in progress.entered, number in progress.stayed
        key = kind, number, frozenset(progress.begun), here_before, last
        had = found.setdefault(key, [])
        if not any(progress.waits_no_more(one.progress) for one in had):
            found[key] = [one for one in had if not one.progress.waits_no_more(progress)]
            found[key].append(At(kind, number, progress.copy(), last))
        progress.enter(kind, number)
    return tuple(map(tuple, found.values()))


def gathers_always(plan: Plan) -> bool:
    """Whether every microbatch gathers the parameters, and its backward frees them."""
    strategy = plan.config.strategy
    return isinstance(strategy, FsdpKeys) and strategy.zero_stage == 3 and not strategy.schedule_name()


def waiting(stages: Mapping[int, Stage], progress: Progress) -> Iterator[Kinds]:
    yield from (scaled(stages[i].kept, count) for i, count in progress.alive.items() if count)
    yield from (scaled(stages[i].stashed, count) for i, count in progress.split.items() if count)


def step_of(kind: str, stage: int) -> tuple[str, int]:
    """The first stage needs no gradients of inputs: its backward is whole, and comes when the weights' would."""
    if stage == 0 and kind in ("I", "W"):
        return ("B" if kind == "W" else ""), stage
    return kind, stage


def of_action(plan: Plan, stage: Stage, at: At) -> Iterator[Kinds]:
    kind, number, progress, last = at
    if kind == "F":
        return stage.forward(fresh=number not in progress.entered or gathers_always(plan))
    first = number not in progress.begun and not (plan.config.strategy.uses_ddp() and plan.num_microbatches == 1)
    if kind == "B":
        stayed = stage.pipelined and number in progress.stayed
        return stage.backward(first=first, last=last or gathers_always(plan), stayed=stayed)
    return stage.inputs_backward() if kind == "I" else stage.weights_backward(first=first)


def scaled(kinds: Kinds, count: int) -> Kinds:
    return {kind: size * count for kind, size in kinds.items()}


def others(stages: Mapping[int, Stage], number: int) -> Kinds:
    """What FSDP keeps gathered for the rank's other stages."""
    rest = sum(one.gathered.everything for i, one in stages.items() if i != number and one.gathered)
    return {UNSHARDED: rest}


def sent(stages: Mapping[int, Stage], begun: set[int]) -> Kinds:
    """The gradient of a stage's input, which stays until the next one has been computed."""
    sending = [one for i, one in stages.items() if one.before and not one.turned and i in begun]
    return {TEMPORARY: sum(one.sizes.shard for one in sending)}


def already(plan: Plan, stages: Mapping[int, Stage], begun: set[int], gradients: float) -> Kinds:
    """The gradients that there are, without those of the stage whose first backward runs. FSDP's are unsharded until
    they are reduced; DDP has its buckets in any case, and a gradient of its own until it is put there."""
    strategy = plan.config.strategy
    own = sum(stages[i].of_weights for i in begun)
    if strategy.uses_fsdp():
        if strategy.reduces_once() and plan.num_microbatches > 1:
            return {UNSHARDED: own, GRADIENTS: -gradients}
        return {} if begun else {GRADIENTS: -gradients}
    if strategy.uses_ddp():
        return {GRADIENTS: own} if plan.num_microbatches > 1 else {}
    return {GRADIENTS: own - gradients}
