"""Replays operators by the sizes of their tensors, forward and backward, as autograd runs them, and notes the peak.

A tensor lives as long as someone uses it: the code, whose references a program drops where the model's code does; a
node of the graph that saved it for its backward; or a gradient on its way. Sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

ACTIVATIONS, TEMPORARY, GRADIENTS, UNSHARDED, LOGITS = (
    "activations", "temporary", "gradients", "unsharded", "logits",
)  # fmt: skip


Kinds = dict[str, float]  # bytes by kind


@dataclass(eq=False, slots=True)
class Buffer:
    """The memory of a tensor, or of several that share it."""

    size: float
    kind: str
    users: int = 1


@dataclass(eq=False, slots=True)
class Value:
    """A tensor of a program. `grad`: its gradient, while the backward has not used it yet. `source`: what operators
    save in its place, as the backward makes it again from that."""

    buffer: Buffer
    grad: Buffer | None = None
    source: Buffer | None = None

    @property
    def saved(self) -> Buffer:
        return self.source or self.buffer


@dataclass(frozen=True, slots=True)
class Weight:
    """The gradient of a weight. `low`: bytes in the dtype of the computation, `full`: in the dtype of the weight."""

    low: float
    full: float


@dataclass(eq=False, slots=True)
class Node:
    """An operator in the graph. `inputs`: what gets a gradient, with the bytes of it; None passes the result's gradient
    on. `scratch`: bytes that its backward needs on top of the gradients that it makes. `others`: further results, of
    which all have gradients when the backward of `out` runs."""

    out: Value
    inputs: Sequence[tuple[Value, float | None]]
    saved: list[Buffer]
    weights: Sequence[Weight]
    scratch: float
    others: Sequence[Value] = ()


@dataclass(eq=False)
class Tape:
    """`kind`: of what is allocated now. `recording`: whether operators save tensors for a backward. `first`: whether
    weights have no gradient yet, so that the first one stays. `gathered`: whether FSDP takes the gradients of weights
    at the end of a layer, in the dtype of the computation. `adds_up`: whether they are added to those of earlier
    microbatches before that."""

    first: bool = False
    gathered: bool = False
    adds_up: bool = False
    kind: str = ACTIVATIONS
    recording: bool = True
    held: Kinds = field(default_factory=dict)
    total: float = 0.0
    peak: float = 0.0
    at_peak: Kinds = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    kept: list[Buffer] | None = None  # results that selective recomputation keeps, while a forward keeps them
    replayed: list[Buffer] | None = None  # the same, while the recomputation takes them
    stashed: list[Buffer] = field(default_factory=list)  # by a split backward, for the weights' gradients
    saves: int = 0  # operators that saved something, or would have
    stop_at: int | None = None  # of a recomputation: it ends where the last tensor was saved

    @property
    def of_weights(self) -> float:
        """Bytes of the weights' gradients."""
        return self.held.get(GRADIENTS, 0.0) + self.held.get(UNSHARDED, 0.0)

    @property
    def stopped(self) -> bool:
        return self.stop_at is not None and self.saves >= self.stop_at

    def allocate(self, size: float, kind: str | None = None) -> Buffer:
        buffer = Buffer(size, kind or self.kind)
        self.held[buffer.kind] = self.held.get(buffer.kind, 0.0) + size
        self.total += size
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, dict(self.held)
        return buffer

    def free(self, buffer: Buffer) -> None:
        buffer.users -= 1
        if buffer.users == 0:
            self.held[buffer.kind] -= buffer.size
            self.total -= buffer.size

    def keep(self, buffer: Buffer) -> Buffer:
        buffer.users += 1
        return buffer

    def transient(self, size: float) -> None:
        """Memory that is needed for a moment."""
        if size > 0:
            self.free(self.allocate(size))

    def value(self, size: float) -> Value:
        return Value(self.allocate(size))

    def drop(self, *values: Value) -> None:
        """The code no longer refers to these."""
        for value in values:
            self.free(value.buffer)

    def new_peak(self) -> None:
        self.peak, self.at_peak = self.total, dict(self.held)

    def apply(
        self,
        size: float | None,
        *inputs: tuple[Value, float | None],
        saved: Iterable[Buffer] = (),
        saves_result: bool = False,
        extra: float = 0.0,
        weights: Sequence[Weight] = (),
        scratch: float = 0.0,
        back: float = 0.0,
        kept: bool = False,
        pieces: float = 0.0,
    ) -> Value:
        """The result of an operator. `size`: its bytes; None shares the first input's memory. `extra`: bytes that it
        saves beside tensors of the program. `scratch`, `back`: what it needs for a moment, forward and backward.
        `kept`: whether selective recomputation keeps the result. `pieces`: bytes of results that it keeps of operators
        inside this one."""
        saved = list(saved)
        self.saves += bool(saved or saves_result or extra)
        skipped = self.stopped and not (saves_result or extra)
        if not skipped:
            self.transient(scratch)
        if size is None:
            buffer = self.keep(inputs[0][0].buffer)
        elif kept and self.replayed and not skipped:
            buffer = self.replayed.pop(0)
        else:
            buffer = self.allocate(0.0 if skipped else size)
        if kept and self.kept is not None:
            self.kept.append(self.keep(buffer))
        if pieces and self.kept is not None:
            self.kept.append(self.allocate(pieces))
        if pieces and self.replayed:
            self.free(self.replayed.pop(0))
        value = Value(buffer)
        if self.recording:
            own = [self.keep(one) for one in saved] + ([self.keep(buffer)] if saves_result else [])
            own += [self.allocate(extra)] if extra else []
            self.nodes.append(Node(value, inputs, own, weights, back))
        elif extra:
            self.transient(extra)
        return value

    def pieces(self, count: int, *inputs: tuple[Value, float | None], weights: Sequence[Weight] = ()) -> list[Value]:
        """Views of an input or of a weight. Their gradients become one when the last one is there."""
        shared = inputs[0][0].buffer if inputs else Buffer(0.0, self.kind)
        values = [Value(self.keep(shared)) for _ in range(count)]
        if self.recording:
            self.nodes.append(Node(values[0], inputs, [], weights, 0.0, values[1:]))
        return values

    def backward(self, nodes: Sequence[Node], out: Value, grad: Buffer, *, split: bool = False) -> None:
        """Run the nodes' backward, the last one first, from the gradient of `out`, which is used up. `split`: only the
        gradients of inputs are computed. What the weights' gradients will need stays: all saved tensors, and the
        gradients of the results of operators that have weights."""
        out.grad = grad
        for node in reversed(nodes):
            incoming, node.out.grad = node.out.grad, None
            if incoming is None:
                self.release(node.saved)
                continue
            if split:
                self.stashed += [self.keep(incoming)] if node.weights else []
                self.pass_on(node, incoming, [])
                continue
            stays = self.gathered and (self.first or not self.adds_up)
            of_weights = [self.allocate(weight.low, UNSHARDED if stays else None) for weight in node.weights]
            self.pass_on(node, incoming, node.saved)
            for weight, low in zip(node.weights, of_weights, strict=True):
                if not self.gathered:
                    self.accumulate(weight, low)
                elif not stays:
                    self.free(low)

    def pass_on(self, node: Node, incoming: Buffer, saved: Sequence[Buffer]) -> None:
        """Give the node's inputs their gradients, and let go of what is not needed any more."""
        made = [self.keep(incoming) if size is None else self.allocate(size) for _, size in node.inputs]
        self.transient(node.scratch)
        self.release(saved)
        self.free(incoming)
        for other in node.others:
            if other.grad is not None:
                self.free(other.grad)
                other.grad = None
        for (value, _), new in zip(node.inputs, made, strict=True):
            value.grad = new if value.grad is None else self.sum(value.grad, new)

    def release(self, buffers: Iterable[Buffer]) -> None:
        for buffer in buffers:
            self.free(buffer)

    def sum(self, one: Buffer, other: Buffer) -> Buffer:
        both = self.allocate(other.size)
        self.free(one)
        self.free(other)
        return both

    def accumulate(self, weight: Weight, low: Buffer) -> None:
        """Convert a weight's gradient to the weight's dtype, and add it to the one that there is, or keep it."""
        full = low
        if weight.full > weight.low:
            full = self.allocate(weight.full, GRADIENTS if self.first else None)
            self.free(low)
        if not self.first:
            self.free(full)
        elif full.kind != GRADIENTS:
            self.held[full.kind] -= full.size
            self.held[GRADIENTS] = self.held.get(GRADIENTS, 0.0) + full.size
            full.kind = GRADIENTS
