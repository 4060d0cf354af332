"""What a layer adds to a rank's memory, forward and backward, by replaying its program."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from launch.planning.memory.layers import layer
from launch.planning.memory.sizes import Sizes
from launch.planning.memory.tape import TEMPORARY, Buffer, Tape, Value
from train.config.schema import ActivationCheckpointing

Kinds = dict[str, float]


@dataclass(frozen=True)
class LayerCost:
    """Bytes by kind, on top of what there is before. `kept`: activations from a layer's forward on, with its result and
    without its input. `forward`, `backward`: at the peaks. `first`: the backward's peak while weights have no
    gradients yet. `result`: of the layer's result, which `backward` does not count. `weights`: of their gradients.
    `inputs`: the temporary peak of a backward for the inputs only, and `stashed`, what it leaves for the weights'."""

    kept: float
    forward: Kinds
    backward: Kinds
    first: Kinds
    result: float
    weights: float
    inputs: float
    stashed: float


@cache
def layer_cost(s: Sizes, mode: ActivationCheckpointing) -> LayerCost:
    kept, forward, t = replayed(s, mode)
    _, _, first = replayed(s, mode, first=True)
    _, _, split = replayed(s, mode, split=True)
    stashed = split.held[TEMPORARY] - s.shard  # the gradient of the input goes on
    peak = split.at_peak[TEMPORARY]
    return LayerCost(kept, forward, dict(t.at_peak), dict(first.at_peak), s.shard, gradients(first), peak, stashed)


def gradients(t: Tape) -> float:
    return t.held.get("gradients", 0.0) + t.held.get("unsharded", 0.0)


def replayed(
    s: Sizes, mode: ActivationCheckpointing, *, first: bool = False, split: bool = False
) -> tuple[float, Kinds, Tape]:
    """(bytes that the forward keeps, its peak, the tape after the backward) of one layer."""
    t = Tape(first=first, gathered=s.gathered)
    x = Value(Buffer(s.shard, "input", users=2))  # not counted: the layer before made it, and a node there keeps it
    t.recording = mode is ActivationCheckpointing.none
    t.kept = [] if mode is ActivationCheckpointing.selective else None
    out = layer(t, s, x)
    kept, forward, saves, held = t.total, dict(t.at_peak), t.saves, t.kept or []
    t.kept, t.kind = None, TEMPORARY
    if not split:
        t.drop(out)
    t.new_peak()
    gradient = t.allocate(s.shard)
    if mode is not ActivationCheckpointing.none:
        t.recording, t.saves, t.stop_at, t.replayed = True, 0, saves, list(held)
        out = layer(t, s, Value(x.buffer))
        t.drop(out)
    left = list(t.replayed or [])
    t.backward(t.nodes, out, gradient, split=split)
    if not split:
        t.release(left)
    return kept, forward, t
