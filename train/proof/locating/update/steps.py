"""The clipped step of SGD with weight decay, w - lr (c g + d w), of every weight: which c and d it has taken."""

from __future__ import annotations

import torch
from torch import Tensor

from train.config.plan import Plan
from train.config.shapes import chunk
from train.config.technique import Split
from train.model.weights import initial_value
from train.proof.collecting import CLIP_NORM, SGD_LR, WEIGHT_DECAY
from train.proof.comparison import Evidence
from train.proof.locating.finding import Guess, Kind
from train.proof.locating.kinds import ROUNDED, SAME, error_of
from train.strategies.techniques import rank_of

Steps = dict[str, tuple[float, float]]  # (c, d) of every weight


def steps_taken(found: Evidence, right: Evidence, plan: Plan) -> Steps:
    """1 and 1 for a matrix, 1 and 0 for the weight of a norm, if all is right."""
    return {name: fit(found.sgd_weights[name], *terms(name, right, plan)) for name in right.sgd_weights}


def common_factor(steps: Steps) -> float | None:
    """The c that all weights have in common, which is then that of clipping; None if they have none, or if it is 1."""
    numbers = [c for c, _ in steps.values()]
    alike = max(numbers) - min(numbers) <= SAME * max(map(abs, numbers))
    return numbers[0] if alike and all(abs(c - 1) > SAME for c in numbers) else None


def guess_of_weights(steps: Steps, found: Evidence, right: Evidence, plan: Plan, worst: str) -> Guess:
    """What is wrong with some of the weights. `worst`: the weight with the largest error, which the guess is about if
    it can be."""
    off = {name: c for name, (c, _) in steps.items() if abs(c - 1) > SAME}
    decayed = {name: d for name, (_, d) in steps.items() if abs(d - (right.gradients[name].ndim >= 2)) > SAME}
    if off:
        name = worst if worst in off else next(iter(off))
        missing = shards_that_stay(name, found.sgd_weights[name], right, plan)
        return missing or Guess(Kind.factor, (), f"{name} moves {off[name]:.4g} times as far")
    if decayed:
        name = worst if worst in decayed else next(iter(decayed))
        number = decayed[name]
        too_little = number < float(right.gradients[name].ndim >= 2)  # a shard may not look like a matrix
        axes = rank_of(plan, 0).split_axes(name) if too_little else ()
        decays = "does not decay" if abs(number) <= SAME else f"decays {number:.3g} times as much as a matrix should"
        more = f", and {len(decayed) - 1} more" if len(decayed) > 1 else ""
        return Guess(Kind.decay, axes, f"{name} {decays}{more}")
    largest = max(error_of(found.sgd_weights[name], value, value) for name, value in right.sgd_weights.items())
    return Guess(Kind.rounding if largest <= ROUNDED else Kind.unknown, (), f"within {largest:.0e}")


def terms(name: str, right: Evidence, plan: Plan) -> tuple[Tensor, Tensor]:
    """The clipped gradient, and the weight before the step."""
    clipping = min(1.0, CLIP_NORM / float(right.grad_norm["norm"]))
    before = initial_value(name, right.gradients[name].shape, plan.config.model, plan.config.train.seed)
    return right.gradients[name].double() * clipping, before.double()


def fit(after: Tensor, gradient: Tensor, before: Tensor) -> tuple[float, float]:
    """(c, d) of the step from `before` to `after`."""
    columns = torch.stack((gradient.flatten(), WEIGHT_DECAY * before.flatten()), 1)
    step = ((before - after.double()) / SGD_LR).flatten().unsqueeze(1)
    c, d = torch.linalg.lstsq(columns, step).solution.squeeze(1).tolist()
    return c, d


def shards_that_stay(name: str, after: Tensor, right: Evidence, plan: Plan) -> Guess | None:
    """Some ranks' shards of the weight move as they should, and others do not move."""
    gradient, before = terms(name, right, plan)
    rank = rank_of(plan, 0)
    for technique in rank.techniques:
        split: Split | None = None if technique.split is None else technique.split(rank, name)
        if split is None or split.degree == 1:
            continue
        pieces = [chunk(after.shape[split.dim], split.degree, i) for i in range(split.degree)]
        moves = []
        for piece in (piece for piece in pieces if len(piece)):
            part = [x.narrow(split.dim, piece.start, len(piece)) for x in (after, gradient, before)]
            moves.append(fit(*part)[0])
        still = [i for i, move in enumerate(moves) if abs(move) <= SAME]
        if still and all(abs(move - 1) <= SAME for i, move in enumerate(moves) if i not in still):
            ranks = ", ".join(map(str, still))
            return Guess(Kind.part_missing, (split.axis,), f"{name} does not move on ranks {ranks} of {split.axis}")
    return None
