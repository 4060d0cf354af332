"""Recognises the kind of a mistake in an activation, or in the gradient of one, from the numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from train.proof.locating.finding import Guess, Kind
from train.proof.locating.layout import Part, Sizes, sequence_dim

SAME = 1e-3  # of a factor: nearer than this is equal
ROUNDED = 2**-6  # bf16 rounds with a relative error of 2^-8; a few such errors may add up


@dataclass(frozen=True)
class Wrong:
    """A piece that is wrong: what rank `rank` has for a microbatch, and the part of the whole tensor that it should
    be. `whole`: the right tensor of the global batch."""

    name: str
    rank: int
    microbatch: int
    piece: Tensor
    part: Part
    whole: Tensor
    scale: float

    @property
    def right(self) -> Tensor:
        return self.part.of(self.whole)

    def fits(self, value: Tensor) -> bool:
        """Whether a value explains the piece: what it leaves unexplained is rounding, and little of the error."""
        if value.shape != self.piece.shape:
            return False
        return explains(
            error_of(self.piece, value, self.whole), error_of(self.piece, self.right, self.whole), self.scale
        )


def explains(rest: float, error: float, scale: float, slack: float = 4.0) -> bool:
    """Whether a guess that leaves the error `rest` of an `error` explains it. Where the scale is large, as in bf16, it
    is not enough that rounding would explain the rest."""
    return rest <= min(slack * scale, error / 8)


def error_of(found: Tensor, right: Tensor, whole: Tensor) -> float:
    """max|found - right| / max|whole|; infinite if it cannot be computed."""
    if torch.equal(found, right):
        return 0.0
    error = float((found.double() - right.double()).abs().max() / whole.double().abs().max())
    return error if error == error else float("inf")


def factors(number: float, sizes: Sizes, num_microbatches: int) -> Guess | None:
    """Which degree or number of microbatches the factor is, or is one divided by."""
    names = {axis: n for axis, n in (sizes.degrees | {"ep": sizes.ep}).items() if n > 1}
    candidates: list[tuple[tuple[str, ...], str, float]] = [
        ((axis,), f"the degree of {axis}", n) for axis, n in names.items()
    ]
    candidates += [((), "the number of microbatches", num_microbatches)] if num_microbatches > 1 else []
    for (a, n), (b, m) in itertools.combinations(names.items(), 2):
        candidates.append(((a, b), f"the degrees of {a} and {b} together", n * m))
    for sign, of in ((1, "times"), (-1, "divided by")):
        found = [(axes, text) for axes, text, n in candidates if abs(number - n**sign) <= SAME * n**sign]
        if found:
            singles = [one for one in found if len(one[0]) < 2] or found
            axes = tuple(dict.fromkeys(axis for one, _ in singles for axis in one))
            return Guess(Kind.factor, axes, f"{of} {number**sign:.4g}, {' or '.join(text for _, text in singles)}")
    return None


def fitted(found: Tensor, right: Tensor) -> float:
    """The number by which `right` must be multiplied to be nearest to `found`."""
    a, b = found.double().flatten(), right.double().flatten()
    square = float(b @ b)
    return float(a @ b) / square if square > 0 else float("nan")


def as_factor(wrong: list[Wrong], sizes: Sizes, num_microbatches: int) -> Guess | None:
    """All pieces are the right value times a number."""
    numbers = []
    for one in wrong:
        number = fitted(one.piece, one.right)
        if number != number or abs(number - 1) <= SAME or not one.fits(one.right.double() * number):
            return None
        numbers.append(number)
    if max(map(abs, numbers)) <= SAME:
        return Guess(Kind.part_missing, (), "it is zero")
    if max(numbers) - min(numbers) > SAME * abs(max(numbers, key=abs)):
        shown = ", ".join(f"rank {one.rank}: {number:.4g}" for one, number in zip(wrong[:4], numbers, strict=False))
        return Guess(Kind.factor, (), f"times other numbers on other ranks or microbatches: {shown}")
    return factors(numbers[0], sizes, num_microbatches) or Guess(Kind.factor, (), f"times {numbers[0]:.4g}")


def as_own_part(wrong: list[Wrong], peers: Callable[[Wrong, str], list[Tensor]], sizes: Sizes) -> Guess | None:
    """The pieces of the ranks along an axis add up to the right value. `peers`: their pieces."""
    for axis in (axis for axis, degree in sizes.degrees.items() if degree > 1):
        sums = [peers(one, axis) for one in wrong]
        if all(
            len(terms) == sizes.degrees[axis]
            and all(term.shape == one.piece.shape for term in terms)
            and one.fits(torch.stack([term.double() for term in terms]).sum(0))
            for one, terms in zip(wrong, sums, strict=True)
        ):
            return Guess(Kind.own_part, (axis,), "the ranks' values add up to the right one")
    return None


def as_sum(wrong: list[Wrong], terms: Mapping[str, list[Tensor]]) -> Guess | None:
    """The value is a sum of some of the right terms. `terms`: the terms of the whole tensor, by axis."""
    for axis, values in terms.items():
        found = []
        for one in wrong:
            columns = torch.stack([one.part.of(value).double().flatten() for value in values], 1)
            numbers = torch.linalg.lstsq(columns, one.piece.double().flatten().unsqueeze(1)).solution.squeeze(1)
            if not one.fits((columns @ numbers).view(one.piece.shape)):
                break
            found.append([round(float(n), 3) for n in numbers])
        else:
            return summed(found, axis)
    return None


def summed(found: list[list[float]], axis: str) -> Guess:
    """What the weights of the terms along an axis say: [piece][rank of the axis]."""
    first, zeros = found[0], [numbers.count(0.0) for numbers in found]
    if all(n == len(first) - 1 for n in zeros):
        return Guess(Kind.own_part, (axis,), f"only one of the {len(first)} terms of the sum is there")
    missing = {numbers.index(0.0) for numbers in found if 0.0 in numbers}
    if all(n == 1 for n in zeros) and len(missing) == 1:
        return Guess(Kind.part_missing, (axis,), f"the term of rank {missing.pop()} of {axis} is missing")
    return Guess(Kind.factor, (axis,), f"the terms of the ranks of {axis} are multiplied by {first}")


def as_stale(wrong: list[Wrong]) -> Guess | None:
    """The value is that of another microbatch, or of other rows."""
    for one in wrong:
        rows, size = (
            one.part.index[0] if one.part.index else torch.tensor([]),
            one.whole.shape[0] if one.whole.ndim else 0,
        )
        starts = [start for start in range(0, size - len(rows) + 1) if len(rows) and start != int(rows[0])]
        others = (Part((torch.arange(start, start + len(rows)), *one.part.index[1:]), ()) for start in starts)
        if (match := next((part for part in others if one.fits(part.of(one.whole))), None)) is None:
            return None
        seen = [int(match.index[0][0]), int(rows[0])]
    return Guess(Kind.stale, (), f"the rows from {seen[1]} have the values of those from {seen[0]}") if wrong else None


def as_positions(wrong: list[Wrong]) -> Guess | None:
    """Every token has the value of another position of its sequence."""
    said = ""
    for one in wrong:
        dim = sequence_dim(one.name)
        if one.whole.ndim <= dim or one.whole.shape[dim] < 2:
            return None
        index = list(one.part.index)
        index[dim] = torch.arange(one.whole.shape[dim])
        row = Part(tuple(index), ()).of(one.whole).movedim(dim, 0).flatten(1).double()
        mine = one.piece.movedim(dim, 0).flatten(1).double()
        distance = torch.cdist(mine, row) if mine.shape[1] > 1 else (mine - row.T).abs()
        nearest = distance.argmin(1)
        index[dim] = nearest
        if not one.fits(Part(tuple(index), ()).of(one.whole)):
            return None
        pairs = [(int(a), int(b)) for a, b in zip(one.part.index[dim], nearest, strict=True) if int(a) != int(b)]
        said = said or f"position {pairs[0][0]} has the value of position {pairs[0][1]}" if pairs else said
    return Guess(Kind.positions, (), said) if said else None


def as_rounding(wrong: list[Wrong]) -> Guess | None:
    """Small errors without structure: seen as a matrix of tokens and features they have full rank, while a term that is
    missing or added has the rank of a weight at most."""
    largest = max(error_of(one.piece, one.right, one.whole) for one in wrong)
    if largest > ROUNDED or any(abs(fitted(one.piece, one.right) - 1) > ROUNDED / 4 for one in wrong):
        return None
    for one in wrong:
        errors = one.piece.double() - one.right.double()
        values = torch.linalg.svdvals(errors.reshape(-1, errors.shape[-1] if errors.ndim else 1))
        if len(values) > 1 and float(values[len(values) // 2]) < 1e-3 * float(values[0]):
            return None
    return Guess(Kind.rounding, (), f"it is within {largest:.0e} of the right value")


def first_guess(guesses: Iterator[Guess | None]) -> Guess | None:
    return next((guess for guess in guesses if guess is not None), None)
