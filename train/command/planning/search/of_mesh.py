"""What a rank sends, updates and holds, for all layouts of a mesh at once.

Everything comes from the same closed forms as the quantities of a single job (`planning.quantities`). They are asked
about small plans with the same mesh, and what a rank sends follows for any number of layers n, of microbatches m and of
sequences u in each, because it has the form

    (a + b n) + (c + d n) m + (e + f n) m u

Two numbers of layers and three pairs (m, u) give the six factors. With fewer than four microbatches some techniques
send otherwise, so those are asked about themselves. DDP's buckets do not grow evenly with the layers: it is not here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

from train.command.planning.job import Job
from train.command.planning.quantities import Message, messages_of
from train.config.plan import Plan
from train.strategies.memory import needs, state_bytes
from train.strategies.pipeline.keys import PipelineKeys

FEW = 4  # microbatches from which on everything is a sum of terms as above
PROBES = ((2, 1), (3, 1), (2, 2))  # (microbatches, sequences in each)

Sent = tuple[Message, ...]


@dataclass(frozen=True)
class Small:
    """A plan with the mesh and the strategy of a layout, and few layers, microbatches and sequences."""

    job: Job

    def with_layers(self, each: int, microbatches: int, sequences: int) -> Job:
        """`each`: the layers of every stage."""
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


@dataclass
class Mesh:
    """What all layouts of a mesh share that differ only in microbatches, kind of recomputation, layers of stages, and
    schedule of the same placement. `classes`: a rank of `pp` of each kind; `places`: the class of each rank of `pp`."""

    small: Small
    classes: tuple[int, ...]
    places: tuple[int, ...]
    sent: dict[tuple[int, int, int, int], Sent] = field(default_factory=dict)
    grown: dict[tuple[int, int, int, int], Sent] = field(default_factory=dict)

    def messages(self, kind: int, layers: int, microbatches: int, sequences: int) -> Sent:
        """Of a rank of this class with so many layers."""
        if microbatches < FEW:
            return self._of_layers(kind, layers, microbatches, sequences)
        one, more, larger = (self._of_layers(kind, layers, *probe) for probe in PROBES)
        return tuple(
            replace(
                first,
                calls=_extended(first.calls, second.calls, third.calls, microbatches, sequences),
                bytes=_extended(first.bytes, second.bytes, third.bytes, microbatches, sequences),
            )
            for first, second, third in zip(one, more, larger, strict=True)
        )

    def _of_layers(self, kind: int, layers: int, microbatches: int, sequences: int) -> Sent:
        chunks, key = self.small.job.stages_per_rank, (kind, layers, microbatches, sequences)
        if key not in self.grown:
            few, more = (self._probe(kind, each, microbatches, sequences) for each in (1, 2))
            self.grown[key] = tuple(
                replace(
                    first,
                    calls=first.calls + (layers - chunks) * (second.calls - first.calls) // chunks,
                    bytes=first.bytes + (layers - chunks) * (second.bytes - first.bytes) // chunks,
                )
                for first, second in zip(few, more, strict=True)
            )
        return self.grown[key]

    def _probe(self, kind: int, each: int, microbatches: int, sequences: int) -> Sent:
        key = (kind, each, microbatches, sequences)
        if key not in self.sent:
            job = self.small.with_layers(each, microbatches, sequences)
            self.sent[key] = messages_of(job, self._rank(kind))
        return self.sent[key]

    def parameters(self, kind: int, layers: int) -> int:
        """The bytes of the parameters that a rank of this class updates."""
        few, more = self._parameters[kind]
        chunks = self.small.job.stages_per_rank
        return few + (layers - chunks) * (more - few) // chunks

    @cached_property
    def _parameters(self) -> list[list[int]]:
        plans = [self.small.with_layers(each, 2, 1).plan for each in (1, 2)]
        ranks = map(self._rank, range(len(self.classes)))
        return [[state_bytes(plan, rank)["parameters"] for plan in plans] for rank in ranks]

    def floor(self, kind: int, layers: int) -> float:
        """Bytes that a rank of this class cannot do without: its state and what FSDP gathers, without activations."""
        few, more = self._floors[kind]
        chunks = self.small.job.stages_per_rank
        return few + (layers - 2 * chunks) * (more - few) / chunks

    @cached_property
    def _floors(self) -> list[list[int]]:
        plans = [self.small.with_layers(each, 1, 1).plan for each in (2, 3)]
        return [[needs(plan, rank).on_device for plan in plans] for rank in map(self._rank, range(len(self.classes)))]

    def _rank(self, kind: int) -> int:
        plan = self.small.job.plan
        return self.classes[kind] * (plan.world_size // plan.degrees["pp"])


def _extended(first: int, more: int, larger: int, microbatches: int, sequences: int) -> int:
    """From the values of PROBES: a + b m + c m u."""
    c = (larger - first) // 2
    b = more - first - c
    return first - 2 * (b + c) + b * microbatches + c * microbatches * sequences
