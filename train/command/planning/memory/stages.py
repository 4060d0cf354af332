"""The peaks of a stage's forward and backward of one microbatch, as bytes by kind on top of what the rank keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from train.command.planning.memory.ends import EmbeddingCost, HeadCost, Vocabulary, embedding_cost, head_cost
from train.command.planning.memory.gathered import Gathered, Unit, gathered_of
from train.command.planning.memory.layers import LayerCost, layer_cost
from train.command.planning.memory.sizes import Sizes, sizes_of
from train.command.planning.memory.tape import ACTIVATIONS, GRADIENTS, LOGITS, TEMPORARY, UNSHARDED, Kinds
from train.config.shapes import chunk
from train.config.technique import Rank
from train.strategies.tensor.keys import TensorKeys

Engine = Callable[[Sizes], Sizes]  # the sizes with what another engine keeps


def as_here(sizes: Sizes) -> Sizes:
    return sizes


def plus(first: Kinds, *others: Kinds) -> Kinds:
    total = {**first}
    for part in others:
        for kind, size in part.items():
            total[kind] = total.get(kind, 0.0) + size
    return total


@dataclass(frozen=True)
class Stage:
    """`before`, `after`: whether there are neighbours, whose hidden states and gradients are buffers of the schedule.
    `turns`: whether the stage after it is on the same rank, as in a V; `turned`: the stage before it. Then the buffers
    are the tensors themselves, which stay until the next step. `pipelined`: whether a schedule keeps the stage's result
    until its backward ends. `offloads`: whether the layers' inputs wait in the host's memory."""

    sizes: Sizes
    num_layers: int
    layer: LayerCost
    embedding: EmbeddingCost | None
    head: HeadCost | None
    gathered: Gathered | None
    before: bool
    after: bool
    turns: bool
    turned: bool
    pipelined: bool
    tied: bool
    offloads: bool

    @cached_property
    def entry(self) -> float:
        """Bytes of the hidden states that enter the first layer, where they are not a buffer of the schedule; under
        context parallelism, also of the rotary table's rows at the rank's positions."""
        s = self.sizes
        rows = float(s.seq_len // s.cp_degree * s.head_dim * s.wide) if s.cp else 0.0
        return rows + (self.embedding.kept if self.embedding else 0.0)

    def after_layers(self, number: int) -> float:
        """Bytes of activations when so many layers have run. If inputs are offloaded, two of these `number` + 1 hidden
        states are on the device."""
        found = self.entry + number * self.layer.kept
        return found - max(number - 1, 0) * self.sizes.shard if self.offloads else found

    @cached_property
    def kept(self) -> Kinds:
        """What a microbatch keeps between its forward and its backward."""
        return plus(self.kept_by_modules, self.beside_loss)

    @cached_property
    def kept_by_modules(self) -> Kinds:
        """What the modules keep of a microbatch, without the result that a schedule keeps."""
        found = {ACTIVATIONS: self.after_layers(self.num_layers) - self.turns * self.layer.result}
        return plus(found, self.head.kept) if self.head else found

    @cached_property
    def result(self) -> Kinds:
        """The last stage's result, which a schedule keeps."""
        return self.head.result if self.head is not None and self.pipelined else {}

    @property
    def beside_loss(self) -> Kinds:
        """The same, while the loss may keep it anyway."""
        return {} if self.head is not None and self.head.keeps_result else self.result

    @cached_property
    def of_weights(self) -> float:
        """Bytes of the gradients of weights before FSDP reduces them, in the dtype in which they add up."""
        if self.gathered is not None:
            return self.gathered.unreduced
        embedding = self.embedding.weight if self.embedding and not self.tied else 0.0
        return embedding + self.num_layers * self.layer.weights + (self.head.weights if self.head else 0.0)

    def forward(self, *, fresh: bool) -> Iterator[Kinds]:
        """`fresh`: whether it is the stage's first forward in the step."""
        g = self.gathered
        if self.embedding:
            yield {ACTIVATIONS: self.embedding.forward, UNSHARDED: g.forward(g.embed, fresh=fresh) if g else 0.0}
        below = {ACTIVATIONS: self.after_layers(self.num_layers - 1)}
        yield plus(below, self.layer.forward, {UNSHARDED: g.forward(g.layer, fresh=fresh) if g else 0.0})
        if self.head:
            every = {ACTIVATIONS: self.after_layers(self.num_layers)}
            if g and fresh:  # the head is copied out of its message, and the last layer's is still there
                yield plus(every, {UNSHARDED: g.loss() + g.head.message + g.layer.message})
            yield plus(every, self.head.forward, {UNSHARDED: g.loss() if g else 0.0})

    def backward(self, *, first: bool, last: bool, stayed: bool) -> Iterator[Kinds]:
        """`first`: whether the stage's weights have no gradients yet. `last`: whether FSDP frees parameters now.
        `stayed`: whether all of them have stayed since a backward."""
        g, layer, held = self.gathered, self.layer, {ACTIVATIONS: self.after_layers(self.num_layers)}
        done = 0.0  # bytes of gradients that exist by then, if they are the first
        kind = UNSHARDED if g is not None and g.once else GRADIENTS
        if self.head:
            cost = self.head.first if first else self.head.backward
            whole = {UNSHARDED: g.loss(stayed=stayed) if g else 0.0}
            yield plus(held, self.beside_loss, cost, whole)
            cost = self.head.product_first if first else self.head.product
            whole = {UNSHARDED: g.head_backward(stayed=stayed) if g else 0.0}
            yield plus(held, self.result, cost, whole)
            if g is not None and not g.once and not g.tied:
                new = {GRADIENTS if first else UNSHARDED: g.head.shard}
                own = plus(held, {TEMPORARY: self.sizes.shard})
                yield plus(own, self.result, {UNSHARDED: g.reduction(g.head, g.layer)}, new)
            done = 0.0 if self.waits else self.grown(self.head.weights, g.head if g else None)
        result = 0.0 if self.head or self.turns else layer.result
        each = self.grown(layer.weights, g.layer if g else None)
        above = self.num_layers - 1
        layers = [(True, above), (False, 0)]
        if self.offloads and above > 1:  # the last layer with two inputs on the device
            layers.append((False, 1))
        for top, below in layers:
            cost = layer.first if first else layer.backward
            if self.after and (top or self.num_layers == 1):
                cost = layer.received_first if first else layer.received
            own = {ACTIVATIONS: self.after_layers(below) + result, LOGITS: self.waits}
            own |= {UNSHARDED: g.layer_backward(top=top and not stayed, last=last) if g else 0.0}
            had = done + (0.0 if top else (above - below) * each)
            yield plus(own, self.result, cost, {kind: had} if first else {})
        if self.embedding:
            yield self.embedding_backward(first=first, last=last)

    @property
    def waits(self) -> float:
        """Bytes of the head's gradient where it waits for the embedding's, as FSDP reduces both at once."""
        g = self.gathered
        return self.embedding.weight if self.embedding and g and g.tied and not g.once else 0.0

    def grown(self, weights: float, unit: Unit | None) -> float:
        """Bytes of gradients that stay after the backward of a unit, if they are the first."""
        if self.gathered is None or unit is None:
            return weights
        return unit.reduced if self.gathered.once else unit.shard

    @cached_property
    def stashed(self) -> Kinds:
        """What a backward for the inputs leaves for the backward for the weights: all but what belongs to the loss."""
        found = plus(self.kept_by_modules, {TEMPORARY: self.num_layers * self.layer.stashed})
        return found if self.head is None else plus(found, {LOGITS: self.head.stashed - self.head.of_loss})

    def inputs_backward(self) -> Iterator[Kinds]:
        """The gradients of the stage's input only. Nothing that the forward kept is freed."""
        unsharded = {UNSHARDED: self.gathered.everything} if self.gathered else {}
        if self.head:
            yield plus(self.kept, {LOGITS: self.head.inputs}, unsharded)
        before = {TEMPORARY: (self.num_layers - 1) * self.layer.stashed + self.layer.inputs}
        before |= {LOGITS: self.head.stashed} if self.head else {}
        yield plus(self.kept, before, unsharded, {TEMPORARY: -self.layer.result} if self.after else {})

    def weights_backward(self, *, first: bool) -> Iterator[Kinds]:
        """The gradients of the weights, one after the other."""
        g = self.gathered
        largest = max(self.head.weights if self.head else 0.0, self.layer.weights)
        unsharded = {UNSHARDED: g.everything} if g else {}
        new = {(GRADIENTS if g is None else UNSHARDED) if first else TEMPORARY: largest}
        yield plus(self.stashed, unsharded, new)

    def embedding_backward(self, *, first: bool, last: bool) -> Kinds:
        g, cost = self.gathered, self.embedding
        assert cost is not None
        found = plus({TEMPORARY: cost.backward + self.waits, LOGITS: self.waits}, self.result)
        if g is None:
            new = first and not self.tied
            rest = {GRADIENTS: self.of_weights - cost.weight * new} if first else {}
            return plus(found, {GRADIENTS if new else TEMPORARY: cost.weight}, rest)
        kind = TEMPORARY if g.once and not first else UNSHARDED
        unreduced = plus({kind: cost.weight}, {UNSHARDED: g.unreduced - g.embed.reduced if first and g.once else 0.0})
        if first and not g.once:
            unreduced |= {GRADIENTS: g.head.shard * (not g.tied) + self.num_layers * g.layer.shard}
        freed = g.frees or last
        gathering = g.embed.gathered + g.head.gathered * self.tied if freed else g.everything
        reducing = 0.0 if g.once else max(g.layer.reduced, g.embed.reduced - g.embed.gathered)
        return plus(found, unreduced, {UNSHARDED: gathering + reducing})


def stage_of(rank: Rank, stage: int, engine: Engine = as_here) -> Stage:
    plan = rank.plan
    strategy, model = plan.config.strategy, plan.config.model
    own = strategy.stages_of(rank.place["pp"], plan.degrees["pp"])
    last, sizes = plan.num_stages - 1, engine(sizes_of(rank))
    degree, place = plan.degrees["tp"], rank.place["tp"]
    part = len(chunk(model.vocab_size, degree, place))
    split_loss = isinstance(strategy, TensorKeys) and strategy.shards_logits()
    both = stage == 0 and stage == last
    whole = sizes.gathered and not (model.tie_embeddings and both)  # FSDP gathers the head in the computation's dtype
    casts, chunks = sizes.used < sizes.kept and not whole, plan.config.train.loss_chunks
    vocabulary = Vocabulary(model.vocab_size, part, degree, split_loss, casts, chunks)
    return Stage(
        sizes,
        len(plan.layers_of_stages[stage]),
        layer_cost(sizes, plan.config.train.activation_checkpointing),
        embedding_cost(sizes, vocabulary) if stage == 0 else None,
        head_cost(sizes, vocabulary) if stage == last else None,
        gathered_of(rank, stage) if strategy.uses_fsdp() else None,
        before=stage > 0,
        after=stage < last,
        turns=stage + 1 in own,
        turned=stage - 1 in own,
        pipelined=strategy.schedule_name() is not None,
        tied=model.tie_embeddings and both,
        offloads=plan.config.train.offload_activations,
    )
