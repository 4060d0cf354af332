"""The first wrong part of the first update: the reported loss, the reduced gradients, the norm, clipping, weights.
After all steps: routing and replicas."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from train.config.plan import Plan
from train.proof.collecting import CLIP_NORM
from train.proof.comparison import Evidence, Named, Verdict, worst
from train.proof.locating.activations import Activations
from train.proof.locating.finding import Finding, Guess, Kind
from train.proof.locating.kinds import SAME, factors
from train.proof.locating.layout import Sizes, likely
from train.proof.locating.reference import SLACK
from train.proof.locating.update.norms import sums_of_squares
from train.proof.locating.update.steps import common_factor, guess_of_weights, steps_taken
from train.proof.locating.update.sums import Place, guess, of_own_rank


@dataclass(frozen=True)
class Updates:
    """`found`, `right`, `moved`: the evidence of the strategy, of one device, and of one device with moved inputs.
    `first`: the activations of the first step."""

    found: Evidence
    right: Evidence
    moved: Evidence
    plan: Plan
    first: Activations

    @property
    def sizes(self) -> Sizes:
        return self.first.sizes

    @property
    def lossy(self) -> float:
        """What gradients may differ by, because they are sent with less precision."""
        return self.plan.config.strategy.lossy_bound()

    def sums(self) -> Finding | None:
        """Of the first step's sums over ranks and microbatches."""
        return self._first({"loss": self.loss, "gradients": self.gradients})

    def step(self) -> Finding | None:
        """Of the first step, SGD's, once gradients are complete."""
        return self._first({"grad_norm": self.norm, "sgd_weights": self.sgd_update})

    def last(self) -> Finding | None:
        """Of what is compared after all steps."""
        columns = {column: partial(self.routing, column) for column in ("routing", "router_bias")}
        return self._first({**columns, "replicas": self.replicas})

    def _first(self, parts: dict[str, Callable[[], Finding | None]]) -> Finding | None:
        """By column, without those in which the strategy is expected to differ."""
        expected = self.plan.config.differs()
        wanted = (part for column, part in parts.items() if column not in expected)
        return next((finding for part in wanted if (finding := part()) is not None), None)

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
        return SLACK * max(moved, self.first.reference.unit)

    def found_at(self, module: str, verdict: Verdict, guess: Guess, ranks: tuple[int, ...] = ()) -> Finding:
        return Finding(module, "update", guess, ranks, verdict.error, verdict.bound, tensor_of(verdict))

    def factor(self, number: float) -> Guess:
        if abs(number - 1) <= SAME:
            return Guess(Kind.unknown, (), "it is nearly right")
        known = factors(number, self.sizes, self.plan.num_microbatches)
        return known or Guess(Kind.factor, (), f"times {number:.4g}")

    def loss(self) -> Finding | None:
        """The loss that is reported, a sum over ranks; what each rank has computed is right."""
        verdict = self.worst("loss")
        if verdict is None:
            return None
        found, right = float(self.found.loss["loss"]), float(self.right.loss["loss"])
        weight = float(self.first.reference.backward["loss"][0])
        place = Place(self.sizes, 1)
        for axis in place.axes:
            terms = place.sums(self.first.reference.token_losses, axis)
            if any(abs(found - term * weight) <= SAME * abs(right) for term in terms):
                return self.found_at("loss", verdict, Guess(Kind.own_part, (axis,), "a rank has its own part"))
        return self.found_at("loss", verdict, self.factor(found / right))

    def gradients(self) -> Finding | None:
        """The gradient that is wrong first in backward order."""
        verdict = self.worst("gradients")
        if verdict is None:
            return None
        if any(
            name not in self.found.gradients or self.found.gradients[name].shape != right.shape
            for name, right in self.right.gradients.items()
        ):
            return self.found_at("gradients", verdict, Guess(Kind.unknown, (), verdict.name))
        for name in reversed([*self.right.gradients]):
            found, right, moved = (side.gradients[name] for side in (self.found, self.right, self.moved))
            verdict = self.judged("gradients", {name: found}, {name: right}, {name: moved})
            if verdict is not None:
                return self.found_at("gradients", verdict, self.guess(name, found, right, verdict.bound))
        return None

    def guess(self, name: str, found: Tensor, right: Tensor, scale: float) -> Guess:
        """What is wrong with the gradient of a parameter in the first step."""
        place, reference = Place(self.sizes, self.plan.num_microbatches), self.first.reference
        what = guess(name, found, right, reference, place, scale)
        if what.kind is Kind.unknown:
            pieces = self.first.judged["backward"].get(name.removesuffix(".weight"), [])
            what = of_own_rank(name, found, reference, pieces, scale) or what
        axes = what.axes or (self.likely(name) if what.kind is Kind.unknown else ())
        return Guess(what.kind, axes, what.because)

    def likely(self, name: str) -> tuple[str, ...]:
        return ("ep",) if self.sizes.ep > 1 and ".experts." in name else likely(self.sizes)

    def norm(self) -> Finding | None:
        verdict = self.worst("grad_norm")
        if verdict is None:
            return None
        found, right = float(self.found.grad_norm["norm"]), float(self.right.grad_norm["norm"])
        if abs(found - min(CLIP_NORM, right)) <= SAME * found and right > CLIP_NORM:
            return self.found_at("norm", verdict, Guess(Kind.stale, (), "it is the norm after clipping"))
        if (what := self.another_norm(found)) is not None:
            return self.found_at("norm", verdict, what)
        return self.found_at("norm", verdict, self.factor(found / right))

    def sgd_update(self) -> Finding | None:
        """The clipped step of SGD with weight decay. Gradients and norm are right."""
        verdict = self.worst("sgd_weights")
        if verdict is None:
            return None
        if verdict.error == float("inf"):
            return self.found_at("weights", verdict, Guess(Kind.unknown, (), verdict.name))
        numbers = steps_taken(self.found, self.right, self.plan)
        if (number := common_factor(numbers)) is not None:
            return self.found_at("clip", verdict, self.clipping(number))
        what = guess_of_weights(numbers, self.found, self.right, self.plan, verdict.name)
        of_no_axis = what.axes or what.kind in (Kind.factor, Kind.decay)
        guess = what if of_no_axis else Guess(what.kind, likely(self.sizes), what.because)
        return self.found_at("weights", verdict, guess)

    def clipping(self, number: float) -> Guess:
        """What is wrong with the factor of clipping, which is `number` times what it should be: another norm, or any
        factor."""
        what = self.another_norm(float(self.right.grad_norm["norm"]) / number, SAME)
        return Guess(what.kind, what.axes, f"it clips by another norm: {what.because}") if what else self.factor(number)

    def another_norm(self, found: float, nearness: float = 1e-6) -> Guess | None:
        """The mistake that gives this norm. A sum that is nearly the right norm explains nothing."""
        right = float(self.right.grad_norm["norm"])
        for what, total in sums_of_squares(self.right.gradients, self.plan):
            if abs(found - total**0.5) <= nearness * found and abs(total**0.5 - right) > abs(found - right) / 2:
                return what
        return None

    def routing(self, column: str) -> Finding | None:
        verdict = self.worst(column)
        return None if verdict is None else self.found_at("routing", verdict, Guess(Kind.unknown))

    def replicas(self) -> Finding | None:
        wrong = {name: float(error) for name, error in self.found.replicas.items() if float(error) > 0}
        if not wrong:
            return None
        name = max(wrong, key=lambda name: wrong[name])
        ranks, axes = re.search(r"on ranks ([\d, and]+) \((.*)\)$", name).groups()  # type: ignore[union-attr]
        numbers = tuple(map(int, re.findall(r"\d+", ranks)))
        guess = Guess(Kind.replicas, tuple(axes.split(", ")), _kinds_of_copies(self.found.replicas))
        return self.found_at(
            "replicas", Verdict("replicas", name.partition(" on ranks")[0], wrong[name], 0.0), guess, numbers
        )


def tensor_of(verdict: Verdict) -> str:
    """The parameter that the verdict names, if it is one."""
    return verdict.name if verdict.column not in ("loss", "grad_norm") else ""


def _kinds_of_copies(errors: Named) -> str:
    """Which kinds of copies differ, such as parameters or a moment, and which are equal."""
    differ = {name.split()[1] for name, error in errors.items() if float(error) > 0}
    equal = {name.split()[1] for name in errors} - differ
    said = f"copies of {', '.join(sorted(differ))} differ"
    return f"{said}, those of {', '.join(sorted(equal))} are equal" if equal else said
