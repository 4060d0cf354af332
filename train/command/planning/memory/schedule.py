"""The moments of a step at which a rank may need the most, in the order of its forwards and backwards."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from train.command.planning.memory.orders import Action, order
from train.command.planning.memory.stages import Stage, plus
from train.command.planning.memory.tape import GRADIENTS, TEMPORARY, UNSHARDED, Kinds
from train.config.plan import Plan
from train.config.technique import Rank
from train.strategies.data.keys import FsdpKeys

ENOUGH = 3  # microbatches that show every moment of a strategy without a pipeline


@dataclass
class Progress:
    """`alive`: how many microbatches of each stage wait for their backward. `split`: those whose inputs' gradients are
    computed, and whose weights' gradients are not. `entered`, `begun`: stages that have run a forward, and that have
    gradients. `stayed`: those whose last action was a backward, after which a schedule keeps what is gathered.
    `backwards`: whole ones, with the one that runs."""

    alive: dict[int, int]
    split: dict[int, int]
    entered: set[int] = field(default_factory=set)
    begun: set[int] = field(default_factory=set)
    stayed: set[int] = field(default_factory=set)
    backwards: int = 0

    def copy(self) -> Progress:
        sets = (set(self.entered), set(self.begun), set(self.stayed))
        return Progress(dict(self.alive), dict(self.split), *sets, self.backwards)

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


def order_of(plan: Plan, place: int) -> Sequence[Action]:
    """(kind, stage) of a rank's forwards and backwards, in order."""
    strategy, m = plan.config.strategy, plan.num_microbatches
    name = strategy.schedule_name()
    if name is None:
        return [("F", 0), ("B", 0)] * min(m, ENOUGH)
    return order(name, plan.degrees["pp"], strategy.num_chunks(), m, place)


def moments(here: Rank, stages: Mapping[int, Stage], gradients: float) -> Iterator[Kinds]:
    """Bytes by kind on top of what the rank holds between steps; `gradients` are those that it holds after one, and a
    moment has the difference."""
    plan = here.plan
    for kind, number, progress in fullest(here, stages).values():
        had = already(plan, stages, progress.begun, gradients)
        rest = plus(waiting(stages, progress), had, others(stages, number), sent(stages, progress.begun))
        yield from (plus(rest, moment) for moment in of_action(plan, stages[number], progress, kind, number))
    yield already(plan, stages, set(stages), gradients)
    if plan.config.strategy.reduces_once() and plan.num_microbatches > 1:
        yield {UNSHARDED: sum(one.gathered.last_reduction() for one in stages.values() if one.gathered),
               GRADIENTS: -gradients}  # fmt: skip
    yield {}


def fullest(here: Rank, stages: Mapping[int, Stage]) -> dict[Hashable, tuple[str, int, Progress]]:
    """For each action that differs from others not only by what waits: the one at which the most waits."""
    progress = Progress(dict.fromkeys(stages, 0), dict.fromkeys(stages, 0))
    last = last_backward(here.plan)
    kept = {number: sum(stage.kept.values()) for number, stage in stages.items()}
    stashed = {number: sum(stage.stashed.values()) for number, stage in stages.items()}
    most: dict[Hashable, float] = {}
    found: dict[Hashable, tuple[str, int, Progress]] = {}
    for action in order_of(here.plan, here.place["pp"]):
        kind, number = step_of(*action)
        if not kind:
            continue
        progress.leave(kind, number)
        progress.backwards += kind == "B"
        here_before = number in progress.entered, number in progress.stayed
        key = kind, number, frozenset(progress.begun), here_before, progress.backwards == last
        size = sum(kept[i] * n for i, n in progress.alive.items()) + sum(
            stashed[i] * n for i, n in progress.split.items()
        )
        if size > most.get(key, -1.0):
            most[key], found[key] = size, (kind, number, progress.copy())
        progress.enter(kind, number)
    return found


def last_backward(plan: Plan) -> int:
    """The number of microbatches, whose last backward frees parameters as it goes; 0 in a pipeline, where none does."""
    return 0 if plan.config.strategy.schedule_name() else plan.num_microbatches


def gathers_always(plan: Plan) -> bool:
    """Whether every microbatch gathers the parameters, and its backward frees them."""
    strategy = plan.config.strategy
    return isinstance(strategy, FsdpKeys) and strategy.zero_stage == 3 and not strategy.schedule_name()


def waiting(stages: Mapping[int, Stage], progress: Progress) -> Kinds:
    kept = [scaled(stages[i].kept, count) for i, count in progress.alive.items() if count]
    return plus(*kept, *(scaled(stages[i].stashed, count) for i, count in progress.split.items() if count))


def step_of(kind: str, stage: int) -> tuple[str, int]:
    """The first stage needs no gradients of inputs: its backward is whole, and comes when the weights' would."""
    if stage == 0 and kind in ("I", "W"):
        return ("B" if kind == "W" else ""), stage
    return kind, stage


def of_action(plan: Plan, stage: Stage, progress: Progress, kind: str, number: int) -> Iterator[Kinds]:
    if kind == "F":
        return stage.forward(fresh=number not in progress.entered or gathers_always(plan))
    first = number not in progress.begun and not (plan.config.strategy.uses_ddp() and plan.num_microbatches == 1)
    if kind == "B":
        last = progress.backwards == last_backward(plan) or gathers_always(plan)
        stayed = stage.pipelined and number in progress.stayed
        return stage.backward(first=first, last=last, stayed=stayed)
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
