"""What a rank sends, updates and holds, for all layouts of a mesh at once.

Everything comes from the same closed forms as the quantities of a single job (`planning.quantities`). They are asked
about small plans with the same mesh, and what a rank sends follows for any number of layers n, of microbatches m and of
sequences u in each, because it has the form

    (a + b n) + (c + d n) m + (e + f n) m u

Two numbers of layers and three pairs (m, u) give the six factors. With fewer than four microbatches some techniques
send otherwise, so those are asked about themselves. DDP's buckets do not grow evenly with the layers: DDP is not here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

from train.command.planning.job import Job
from train.command.planning.quantities import Messages, by_name, summed
from train.config.plan import Plan
from train.config.schema import ModelConfig
from train.config.technique import Rank
from train.strategies.memory import Needs, needs, state_bytes
from train.strategies.pipeline.keys import PipelineKeys
from train.strategies.techniques import rank_of

FEW = 4  # microbatches from which on everything is a sum of terms as above
PROBES = ((2, 1), (3, 1), (2, 2))  # (microbatches, sequences in each)
Probe = tuple[int, int, int, int]  # class, layers of every stage, microbatches, sequences in each


def shares_of(model: ModelConfig, degrees: tuple[int, ...]) -> tuple[int, ...]:
    """The degrees of data parallelism on which other messages depend: in a mixture all, as experts are split over them;
    with tied embeddings that of the shards, as the ends of a pipeline exchange theirs; else none."""
    _, replicate, shard, _, _ = degrees
    if model.num_experts:
        return replicate, shard
    return (shard,) if model.tie_embeddings else ()


@dataclass(frozen=True)
class Small:
    """A plan with the mesh and the strategy of a layout, and few layers, microbatches and sequences."""

    job: Job
    made: dict[tuple[int, int, int], Job] = field(default_factory=dict, compare=False, repr=False)

    def with_layers(self, each: int, microbatches: int, sequences: int) -> Job:
        """`each`: the layers of every stage."""
        key = (each, microbatches, sequences)
        if key not in self.made:
            self.made[key] = self._with_layers(*key)
        return self.made[key]

    def _with_layers(self, each: int, microbatches: int, sequences: int) -> Job:
        plan = self.job.plan
        strategy, stages = plan.config.strategy, plan.num_stages
        if isinstance(strategy, PipelineKeys):
            strategy = replace(strategy, layers_per_stage=[each] * stages)
        config = replace(
            plan.config,
            strategy=strategy,
            model=replace(plan.config.model, num_layers=each * stages),
            train=replace(
                plan.config.train,
                micro_batch_size=sequences,
                global_batch_size=sequences * microbatches * plan.data_ranks,
            ),
        )
        return replace(self.job, plan=Plan(config, plan.world_size))

    def grown(self, first: int, step: int, layers: int, each: int = 1) -> int:
        """What is `first` with `each` layers a stage and grows by `step` with one more on every stage of a rank."""
        chunks = self.job.stages_per_rank
        return first + (layers - each * chunks) * step // chunks

    def rank(self, place: int) -> int:
        """The first rank with this index on `pp`."""
        plan = self.job.plan
        return place * (plan.world_size // plan.degrees["pp"])


@dataclass
class Sending:
    """What the ranks of a mesh send by some techniques. `of_rank`: what a rank sends; `sent`: what was asked of it,
    which meshes may share. `classes`: see `Mesh`."""

    small: Small
    classes: tuple[int, ...]
    of_rank: Callable[[Job, Rank], Messages]
    sent: dict[Probe, Messages] = field(default_factory=dict)
    grown: dict[Probe, Messages] = field(default_factory=dict)

    def messages(self, kind: int, layers: int, microbatches: int, sequences: int) -> Messages:
        """Of a rank of this class with so many layers."""
        key = (kind, layers, microbatches, sequences)
        if microbatches < FEW or key in self.grown:
            return self._of_layers(key)
        one, more = (self._of_layers((kind, layers, *probe)) for probe in PROBES[:2])
        larger = one if sequences == 1 else self._of_layers((kind, layers, *PROBES[2]))
        self.grown[key] = tuple(
            replace(
                first,
                calls=_extended(first.calls, second.calls, third.calls, microbatches, sequences),
                bytes=_extended(first.bytes, second.bytes, third.bytes, microbatches, sequences),
            )
            for first, second, third in zip(one, more, larger, strict=True)
        )
        return self.grown[key]

    def _of_layers(self, key: Probe) -> Messages:
        if key not in self.grown:
            kind, layers, microbatches, sequences = key
            few, more = (by_name(self._probe((0, each, microbatches, sequences))) for each in (1, 2))
            step = {name: (more[name].calls - one.calls, more[name].bytes - one.bytes) for name, one in few.items()}
            found = []
            for name, one in by_name(self._probe((kind, 1, microbatches, sequences))).items():
                calls, size = (
                    self.small.grown(first, step, layers)
                    for first, step in zip((one.calls, one.bytes), step.get(name, (0, 0)), strict=True)
                )
                found.append(replace(one, calls=calls, bytes=size))
            self.grown[key] = tuple(found)
        return self.grown[key]

    def _probe(self, key: Probe) -> Messages:
        if key not in self.sent:
            kind, each, microbatches, sequences = key
            job = self.small.with_layers(each, microbatches, sequences)
            here = rank_of(job.plan, self.small.rank(self.classes[kind]))
            self.sent[key] = self.of_rank(job, here)
        return self.sent[key]


@dataclass
class Mesh:
    """What all layouts of a mesh share that differ only in microbatches, kind of recomputation, layers of stages, and
    schedule of the same placement. `classes`: a rank of `pp` of each kind; `places`: the class of each rank of `pp`.
    `model`: what is sent apart from data parallelism; `data`: the rest."""

    small: Small
    classes: tuple[int, ...]
    places: tuple[int, ...]
    model: Sending
    data: Sending
    known: dict[Probe, Messages] = field(default_factory=dict)

    def messages(self, kind: int, layers: int, microbatches: int, sequences: int) -> Messages:
        """Of a rank of this class with so many layers."""
        key = (kind, layers, microbatches, sequences)
        if key not in self.known:
            rest = self.model.messages(*key)
            self.known[key] = summed(rest, self.data.messages(kind, layers, microbatches, 1))
        return self.known[key]

    def parameters(self, kind: int, layers: int) -> int:
        """The bytes of the parameters that a rank of this class updates."""
        firsts, step = self._parameters
        return self.small.grown(firsts[kind], step, layers)

    @cached_property
    def _parameters(self) -> tuple[list[int], int]:
        few, more = (self.small.with_layers(each, 2, 1).plan for each in (1, 2))
        firsts = [state_bytes(few, self.small.rank(place))["parameters"] for place in self.classes]
        return firsts, state_bytes(more, self.small.rank(self.classes[0]))["parameters"] - firsts[0]

    def floor(self, kind: int, layers: int) -> float:
        """Bytes that a rank of this class cannot do without: its state and what FSDP gathers, without activations."""
        firsts, step = self._floors
        return self.small.grown(firsts[kind], step, layers, 2)

    @cached_property
    def _floors(self) -> tuple[list[int], int]:
        few, more = (self.small.with_layers(each, 1, 1).plan for each in (2, 3))
        firsts = [_least(needs(few, self.small.rank(place))) for place in self.classes]
        return firsts, _least(needs(more, self.small.rank(self.classes[0]))) - firsts[0]


def _least(found: Needs) -> int:
    """Gradients that are reduced exist after what is gathered has been freed."""
    return found.parameters + found.optimiser + max(found.gradients, found.unsharded)


def _extended(first: int, more: int, larger: int, microbatches: int, sequences: int) -> int:
    """From the values of PROBES: a + b m + c m u; for one sequence the third is the first, as b + c is enough."""
    c = (larger - first) // 2
    b = more - first - c
    return first - 2 * (b + c) + b * microbatches + c * microbatches * sequences
