"""The first wrong part of the update: the reported loss, the reduced gradients, the norm, clipping, moments, weights,
evaluation, routing, replicas. All activations and their gradients are right."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from train.config.plan import Plan
from train.model.transformer import dtypes
from train.model.weights import initial_value
from train.proof.collecting import CLIP_NORM, SGD_LR, WEIGHT_DECAY
from train.proof.comparison import Evidence, Named, Verdict, worst
from train.proof.locating.activations import Activations
from train.proof.locating.adamw import first_wrong
from train.proof.locating.finding import Finding, Guess, Kind
from train.proof.locating.kinds import error_of, factors, fitted
from train.proof.locating.layout import Sizes, likely
from train.proof.locating.norms import sums_of_squares
from train.proof.locating.reference import SLACK, Reference
from train.proof.locating.sums import Place, guess, of_own_rank
from train.ranks.optim import decays
from train.ranks.state import Piece

SAME = 1e-3  # of a factor: nearer than this is equal


@dataclass(frozen=True)
class Updates:
    """`found`, `right`, `moved`: the evidence of the strategy, of one device, and of one device with moved inputs.
    `held`, `right_held`, `moved_held`: the pieces after the first and the last AdamW step, of every rank, and of one
    device. `lossy`: what gradients may differ by, because they are sent with less precision."""

    found: Evidence
    right: Evidence
    moved: Evidence
    held: Sequence[Sequence[Sequence[Piece]]]  # [rank][step]
    right_held: Sequence[Sequence[Piece]]
    moved_held: Sequence[Sequence[Piece]]
    reference: Reference
    plan: Plan
    lossy: float
    activations: Activations

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.plan.degrees, self.plan.config.train.seq_len, self.plan.ep)

    def first_wrong(self) -> Finding | None:
        return next((finding for part in self.parts() if (finding := part()) is not None), None)

    def parts(self) -> Iterator[Callable[[], Finding | None]]:
        """The parts of the update in their order, without those in which the strategy is expected to differ."""
        columns = {
            "loss": self.loss,
            "gradients": self.gradients,
            "grad_norm": self.norm,
            "sgd_weights": self.sgd_update,
            "adamw_loss": self.adamw_update,
            "evaluate": self.evaluation,
            "routing": self.routing,
            "replicas": self.replicas,
        }
        return (part for column, part in columns.items() if column not in self.plan.config.strategy.differs())

    def worst(self, column: str) -> Verdict | None:
        """The largest error of a column, if it is more than rounding explains."""
        of_found, of_right, of_moved = (getattr(side, column) for side in (self.found, self.right, self.moved))
        return self.judged(column, of_found, of_right, of_moved) if of_right else None

    def judged(self, column: str, found: Named, right: Named, moved: Named) -> Verdict | None:
        norm = float(self.right.grad_norm["norm"])
        scale = self.scale(worst(column, moved, right, norm, 0.0).error)
        verdict = worst(column, found, right, norm, max(scale, self.lossy))
        return None if verdict.equal else verdict

    def scale(self, moved: float) -> float:
        """What rounding explains of an error, if moved inputs lead to an error of `moved`."""
        return SLACK * max(moved, torch.finfo(dtypes(self.plan.config.precision)["compute_dtype"]).eps)

    def found_at(self, module: str, verdict: Verdict, guess: Guess, ranks: tuple[int, ...] = ()) -> Finding:
        return Finding(
            module, "update", guess, ranks, verdict.error, verdict.bound, tensor_of(verdict), self.activations.boxes()
        )

    def factor(self, number: float) -> Guess:
        known = factors(number, self.sizes, self.plan.num_microbatches)
        return known or Guess(Kind.factor, (), f"times {number:.4g}")

    def loss(self) -> Finding | None:
        """The loss that is reported, a sum over ranks; what each rank has computed is right."""
        verdict = self.worst("loss")
        if verdict is None:
            return None
        found, right = float(self.found.loss["loss"]), float(self.right.loss["loss"])
        weight = float(self.reference.backward["loss"][0])
        place = Place(self.sizes, 1)
        for axis in place.axes:
            terms = [
                float(
                    self.reference.token_losses[
                        torch.meshgrid(*place.tokens({axis: i}, self.batch), indexing="ij")
                    ].sum()
                )
                * weight
                for i in range(self.plan.degrees[axis])
            ]
            if any(abs(found - term) <= SAME * abs(right) for term in terms):
                return self.found_at("loss", verdict, Guess(Kind.own_part, (axis,), "a rank has its own part"))
        return self.found_at("loss", verdict, self.factor(found / right))

    @property
    def batch(self) -> int:
        return self.plan.config.train.global_batch_size

    def gradients(self) -> Finding | None:
        """The gradient that is wrong first in backward order."""
        if self.worst("gradients") is None:
            return None
        for name in reversed([*self.right.gradients]):
            found, right, moved = (side.gradients[name] for side in (self.found, self.right, self.moved))
            verdict = self.judged("gradients", {name: found}, {name: right}, {name: moved})
            if verdict is not None:
                place = Place(self.sizes, self.plan.num_microbatches)
                what = guess(name, found, right, self.reference, place, verdict.bound)
                if what.kind is Kind.unknown:
                    pieces = self.activations.judged["backward"].get(name.removesuffix(".weight"), [])
                    what = of_own_rank(name, found, self.reference, pieces, verdict.bound) or what
                axes = what.axes or (likely(self.sizes) if what.kind is Kind.unknown else ())
                return self.found_at("gradients", verdict, Guess(what.kind, axes, what.because))
        return None

    def norm(self) -> Finding | None:
        verdict = self.worst("grad_norm")
        if verdict is None:
            return None
        found, right = float(self.found.grad_norm["norm"]), float(self.right.grad_norm["norm"])
        if abs(found - min(CLIP_NORM, right)) <= SAME * found and right > CLIP_NORM:
            return self.found_at("norm", verdict, Guess(Kind.stale, (), "it is the norm after clipping"))
        for what, total in sums_of_squares(self.right.gradients, self.plan):
            if abs(found - total**0.5) <= 1e-6 * found:
                return self.found_at("norm", verdict, what)
        return self.found_at("norm", verdict, self.factor(found / right))

    def sgd_update(self) -> Finding | None:
        """The clipped step of SGD with weight decay: w - lr (c g + d w). Gradients and norm are right."""
        verdict = self.worst("sgd_weights")
        if verdict is None:
            return None
        clipping = min(1.0, CLIP_NORM / float(self.right.grad_norm["norm"]))
        steps: dict[str, tuple[float, float]] = {}
        for name, right in self.right.sgd_weights.items():
            model = self.plan.config.model
            before = initial_value(name, right.shape, model, self.plan.config.train.seed).double()
            gradient = self.right.gradients[name].double() * clipping
            step = (before - self.found.sgd_weights[name].double()) / SGD_LR
            columns = torch.stack((gradient.flatten(), WEIGHT_DECAY * before.flatten()), 1)
            c, d = torch.linalg.lstsq(columns, step.flatten().unsqueeze(1)).solution.squeeze(1).tolist()
            steps[name] = c, d - float(decays(torch.nn.Parameter(before)))
        off = {name: c for name, (c, _) in steps.items() if abs(c - 1) > SAME}
        decayed = [name for name, (_, d) in steps.items() if abs(d) > SAME]
        if (
            off
            and len(off) == len(steps)
            and max(off.values()) - min(off.values()) <= SAME * max(map(abs, off.values()))
        ):
            return self.found_at("clip", verdict, self.factor(next(iter(off.values()))))
        if off:
            name, number = next(iter(off.items()))
            still = abs(number) <= SAME
            because = f"{name} is not updated" if still else f"{name} moves {number:.4g} times as far"
            return self.found_at("weights", verdict, Guess(Kind.stale if still else Kind.factor, (), because))
        if decayed:
            name = decayed[0]
            because = f"{name} decays {steps[name][1] + float(self.is_matrix(name)):.3g} times as much as one device's"
            return self.found_at("weights", verdict, Guess(Kind.decay, (), because))
        return self.found_at(
            "weights", verdict, self.by_rounding(self.found.sgd_weights, self.right.sgd_weights, verdict)
        )

    def is_matrix(self, name: str) -> bool:
        return self.right.gradients[name].ndim >= 2

    def by_rounding(self, found: Named, right: Named, verdict: Verdict) -> Guess:
        if verdict.error <= 2**-6:
            return Guess(Kind.rounding, (), f"{verdict.name} is within {verdict.error:.0e} of the right value")
        return Guess(Kind.unknown)

    def adamw_update(self) -> Finding | None:
        """Moments and weights after the first and after the last AdamW step."""
        wrong = first_wrong(self.held, self.right_held, self.moved_held, self.scale, self.lossy)
        if wrong is None:
            return None
        number = fitted(wrong.found, wrong.right)
        fits = number == number and error_of(wrong.found, wrong.right.double() * number, wrong.right) <= 4 * wrong.scale
        kind = self.factor(number) if fits else Guess(Kind.unknown, likely(self.sizes))
        verdict = Verdict(wrong.module, wrong.name, wrong.error, wrong.scale)
        return self.found_at(
            wrong.module, verdict, kind, wrong.ranks if len(wrong.ranks) < self.plan.world_size else ()
        )

    def evaluation(self) -> Finding | None:
        verdict = self.worst("evaluate")
        if verdict is None:
            return None
        found, right = float(self.found.evaluate[verdict.name]), float(self.right.evaluate[verdict.name])
        return self.found_at("evaluate", verdict, self.factor(found / right))

    def routing(self) -> Finding | None:
        for column in ("routing", "router_bias"):
            if (verdict := self.worst(column)) is not None:
                return self.found_at("routing", verdict, Guess(Kind.unknown))
        return None

    def replicas(self) -> Finding | None:
        wrong = {name: float(error) for name, error in self.found.replicas.items() if float(error) > 0}
        if not wrong:
            return None
        name = max(wrong, key=lambda name: wrong[name])
        ranks, axes = re.search(r"on ranks ([\d, and]+) \((.*)\)$", name).groups()  # type: ignore[union-attr]
        numbers = tuple(map(int, re.findall(r"\d+", ranks)))
        guess = Guess(Kind.replicas, tuple(axes.split(", ")), "the ranks hold other bits")
        return self.found_at(
            "replicas", Verdict("replicas", name.partition(" on ranks")[0], wrong[name], 0.0), guess, numbers
        )


def tensor_of(verdict: Verdict) -> str:
    """The parameter that the verdict names, if it is one."""
    return verdict.name if verdict.column not in ("loss", "grad_norm") else ""
