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
from train.strategies.scalars import scalars
from train.strategies.techniques import rank_of
from train.strategies.traffic import of_techniques, sent

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


Probe = tuple[int, int, int, int]  # class, layers of every stage, microbatches, sequences in each
# What other techniques send is the same for all meshes that name the same axes, however data ranks share the weights.
OF_DATA = ("FSDP", "DDP")


@dataclass
class Mesh:
    """What all layouts of a mesh share that differ only in microbatches, kind of recomputation, layers of stages, and
    schedule of the same placement. `classes`: a rank of `pp` of each kind; `places`: the class of each rank of `pp`.
    `shared`: what meshes with other data ranks send alike, or None if it is not alike."""

    small: Small
    classes: tuple[int, ...]
    places: tuple[int, ...]
    shared: dict[Probe, Sent] | None = None
    sent: dict[Probe, Sent] = field(default_factory=dict)
    grown: dict[Probe, Sent] = field(default_factory=dict)

    def messages(self, kind: int, layers: int, microbatches: int, sequences: int) -> Sent:
        """Of a rank of this class with so many layers."""
        key = (kind, layers, microbatches, sequences)
        if microbatches < FEW or key in self.grown:
            return self._of_layers(key)
        one, more, larger = (self._of_layers((kind, layers, *probe)) for probe in PROBES)
        self.grown[key] = tuple(
            replace(
                first,
                calls=_extended(first.calls, second.calls, third.calls, microbatches, sequences),
                bytes=_extended(first.bytes, second.bytes, third.bytes, microbatches, sequences),
            )
            for first, second, third in zip(one, more, larger, strict=True)
        )
        return self.grown[key]

    def _of_layers(self, key: Probe) -> Sent:
        if key not in self.grown:
            kind, layers, microbatches, sequences = key
            few, more = (_by_name(self._probe((0, each, microbatches, sequences))) for each in (1, 2))
            step = {name: (more[name].calls - one.calls, more[name].bytes - one.bytes) for name, one in few.items()}
            found = []
            for one in self._probe((kind, 1, microbatches, sequences)):
                calls, size = step.get((one.axis, one.op), (0, 0))
                found.append(
                    replace(
                        one, calls=self._grown(one.calls, calls, layers), bytes=self._grown(one.bytes, size, layers)
                    )
                )
            self.grown[key] = tuple(found)
        return self.grown[key]

    def _grown(self, first: int, step: int, layers: int, each: int = 1) -> int:
        """What is `first` with `each` layers a stage and grows by `step` with one more on every stage of a rank."""
        chunks = self.small.job.stages_per_rank
        return first + (layers - each * chunks) * step // chunks

    def _probe(self, key: Probe) -> Sent:
        if key not in self.sent:
            kind, each, microbatches, sequences = key
            job = self.small.with_layers(each, microbatches, sequences)
            here = rank_of(job.plan, self._rank(kind))
            others = [one for one in here.techniques if one.name not in OF_DATA]
            if self.shared is None:
                rest = messages_of(job, sent(here, of_techniques(here, others)))
            else:
                if key not in self.shared:
                    self.shared[key] = messages_of(job, sent(here, of_techniques(here, others)))
                rest = self.shared[key]
            of_data = [one for one in here.techniques if one.name in OF_DATA]
            own = messages_of(job, sent(here, [*of_techniques(here, of_data), *scalars(here)]))
            self.sent[key] = _summed(rest, own)
        return self.sent[key]

    def parameters(self, kind: int, layers: int) -> int:
        """The bytes of the parameters that a rank of this class updates."""
        firsts, step = self._parameters
        return self._grown(firsts[kind], step, layers)

    @cached_property
    def _parameters(self) -> tuple[list[int], int]:
        few, more = (self.small.with_layers(each, 2, 1).plan for each in (1, 2))
        firsts = [state_bytes(few, self._rank(kind))["parameters"] for kind in range(len(self.classes))]
        return firsts, state_bytes(more, self._rank(0))["parameters"] - firsts[0]

    def floor(self, kind: int, layers: int) -> float:
        """Bytes that a rank of this class cannot do without: its state and what FSDP gathers, without activations."""
        firsts, step = self._floors
        return self._grown(firsts[kind], step, layers, 2)

    @cached_property
    def _floors(self) -> tuple[list[int], int]:
        few, more = (self.small.with_layers(each, 1, 1).plan for each in (2, 3))
        firsts = [needs(few, self._rank(kind)).on_device for kind in range(len(self.classes))]
        return firsts, needs(more, self._rank(0)).on_device - firsts[0]

    def _rank(self, kind: int) -> int:
        plan = self.small.job.plan
        return self.classes[kind] * (plan.world_size // plan.degrees["pp"])


def _extended(first: int, more: int, larger: int, microbatches: int, sequences: int) -> int:
    """From the values of PROBES: a + b m + c m u."""
    c = (larger - first) // 2
    b = more - first - c
    return first - 2 * (b + c) + b * microbatches + c * microbatches * sequences


def _by_name(messages: Sent) -> dict[tuple[str, str], Message]:
    return {(one.axis, one.op): one for one in messages}


def _summed(some: Sent, others: Sent) -> Sent:
    """Messages of the same axis and operation added up."""
    found = _by_name(some)
    for one in others:
        old = found.get((one.axis, one.op))
        both = one if old is None else replace(old, calls=old.calls + one.calls, bytes=old.bytes + one.bytes)
        found[one.axis, one.op] = both
    return tuple(found.values())
