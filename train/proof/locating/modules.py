"""Recognises mistakes of single modules: what they would give with other positions, masks, rows or weights."""

from __future__ import annotations

import torch

from train.proof.locating.finding import Guess, Kind
from train.proof.locating.kinds import Wrong, factors, fitted
from train.proof.locating.layout import Sizes
from train.proof.locating.reference import Reference

LONGEST = 256  # tokens of a sequence, up to which all positions and masks are tried: the memory grows with their square


def as_rotation(wrong: list[Wrong], reference: Reference) -> Guess | None:
    """Queries or keys are rotated as if their tokens had other positions."""
    said = ""
    for one in wrong:
        length, own = one.whole.shape[2], one.part.index[2]
        if length > LONGEST:
            return None
        rotations = torch.stack([one.part.of(reference.rotated(one.name, t)) for t in range(length)])
        distances = (rotations - one.piece).abs().amax((1, 2, 4))  # [position, token]
        nearest = distances.argmin(0)
        if not one.fits(rotations[nearest, :, :, torch.arange(len(own))].permute(1, 2, 0, 3)):
            return None
        pairs = [(int(a), int(b)) for a, b in zip(own, nearest, strict=True) if int(a) != int(b)]
        said = said or (f"position {pairs[0][0]} is rotated as position {pairs[0][1]}" if pairs else "")
    return Guess(Kind.positions, (), said) if said else None


def as_mask(wrong: list[Wrong], reference: Reference, sizes: Sizes) -> Guess | None:
    """What attention gives with other masks: none, one that is shifted, or a rank's own keys only."""
    length = wrong[0].whole.shape[2]
    if length > LONGEST:
        return None
    query, key = torch.meshgrid(torch.arange(length), torch.arange(length), indexing="ij")
    variants = {
        "queries see all keys": torch.zeros(length, length, dtype=torch.bool),
        "queries see the next key too": key > query + 1,
        "queries do not see their own key": key >= query,
    }
    for said, masked in variants.items():
        if all(one.fits(one.part.of(reference.attention(wrong[0].name, masked))) for one in wrong):
            return Guess(Kind.mask, (), said)
    if sizes.degrees["cp"] == 1:
        return None
    for one in wrong:
        elsewhere = torch.ones(length, dtype=torch.bool)
        elsewhere[one.part.index[2]] = False
        if not one.fits(one.part.of(reference.attention(one.name, (key > query) | elsewhere[key]))):
            return None
    return Guess(Kind.own_part, ("cp",), "queries see only the keys of their own rank")


def as_unmasked_rows(wrong: list[Wrong], reference: Reference, sizes: Sizes) -> Guess | None:
    """The embedding of a token has the first row of every shard that does not hold the token, in addition."""
    n, size = sizes.degrees["tp"], reference.config.model.vocab_size
    if wrong[0].name != "embed" or n == 1 or not reference.first:
        return None
    width = -(-size // n)
    table, owner = reference.embedding(), (reference.forward["embed:tokens"] // width).unsqueeze(-1)
    value = wrong[0].whole + torch.stack([table[i * width] * (owner != i) for i in range(n)]).sum(0)
    if not all(one.fits(one.part.of(value)) for one in wrong):
        return None
    return Guess(Kind.mask, ("tp",), "tokens of other ranks' rows are not masked")


def as_old_weights(wrong: list[Wrong], reference: Reference) -> Guess | None:
    """A linear module uses the weights that it had before the last update."""
    value = reference.with_old_weights(wrong[0].name)
    if value is None or not all(one.fits(one.part.of(value)) for one in wrong):
        return None
    return Guess(Kind.stale, (), "it is what the weights before the update give")


def as_auxiliary(wrong: list[Wrong], reference: Reference, sizes: Sizes, num_microbatches: int) -> Guess | None:
    """The part of the gradient that comes from the auxiliary loss is multiplied by a number."""
    value = reference.auxiliary(wrong[0].name)
    if value is None:
        return None
    numbers = [1 + fitted(one.piece.double() - one.right.double(), one.part.of(value)) for one in wrong]
    if not all(
        one.fits(one.right.double() + (number - 1) * one.part.of(value))
        for one, number in zip(wrong, numbers, strict=True)
    ):
        return None
    guess = factors(numbers[0], sizes, num_microbatches) or Guess(Kind.factor, (), f"times {numbers[0]:.4g}")
    # the loss is a mean over sequences, which ranks of ep do not share in another way than those of the data axes
    axes = tuple(axis for axis in guess.axes if axis != "ep") or guess.axes
    return Guess(guess.kind, axes, f"the part of the auxiliary loss is {guess.because}")
