"""The localisation's single questions, without a world: which part of a tensor a rank has, and what kind of mistake
numbers show."""

import pytest
import torch

from train.config.strategy import MESH_AXES
from train.proof.locating import kinds
from train.proof.locating.finding import Kind
from train.proof.locating.kinds import Wrong
from train.proof.locating.layout import Part, Sizes, parts
from train.proof.locating.trace import Trace
from train.proof.locating.update.sums import MICROBATCH, Place, of_weights

ROWS, LENGTH, WIDTH = 4, 16, 6


def sizes(ep=1, **degrees):
    return Sizes(dict.fromkeys(MESH_AXES, 1) | degrees, LENGTH, ep)


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def everything(whole):
    return Part(tuple(torch.arange(n) for n in whole.shape), ())


def wrong(piece, whole, part=None, name="layers.0"):
    return Wrong(name, 0, 0, piece, part or everything(whole), whole, 1e-12)


# which degree a factor is


@pytest.mark.parametrize(
    ("number", "axes", "because"),
    [
        (4.0, ("tp",), "times 4, the degree of tp"),
        (0.5, ("dp_shard",), "divided by 2, the degree of dp_shard"),
        (1 / 3, (), "divided by 3, the number of microbatches"),
        (8.0, ("dp_shard", "tp"), "times 8, the degrees of dp_shard and tp together"),
    ],
)
def test_a_factor_is_that_of_a_degree_or_of_the_microbatches(number, axes, because):
    guess = kinds.factors(number, sizes(dp_shard=2, tp=4), 3)
    assert guess is not None and guess.kind is Kind.factor
    assert guess.axes == axes and guess.because == because


def test_a_factor_that_is_no_degree_is_not_guessed():
    assert kinds.factors(1.7, sizes(dp_shard=2, tp=4), 3) is None


def test_equal_degrees_cannot_be_told_apart():
    guess = kinds.factors(2.0, sizes(dp_shard=2, tp=2), 2)
    assert guess is not None and guess.axes == ("dp_shard", "tp")
    assert "or the number of microbatches" in guess.because


# what a wrong value is


def test_a_value_times_a_number():
    whole = numbers(ROWS, LENGTH, WIDTH)
    guess = kinds.as_factor([wrong(whole * 2, whole)], sizes(tp=2), 1)
    assert guess is not None and (guess.kind, guess.axes) == (Kind.factor, ("tp",))
    zero = kinds.as_factor([wrong(whole * 0, whole)], sizes(tp=2), 1)
    assert zero is not None and zero.kind is Kind.part_missing
    other = kinds.as_factor([wrong(whole * 2, whole), wrong(whole * 3, whole)], sizes(tp=2), 1)
    assert other is not None and other.because.startswith("times other numbers on other ranks")
    assert kinds.as_factor([wrong(whole + 1, whole)], sizes(tp=2), 1) is None


@pytest.mark.parametrize(
    ("weights", "kind", "because"),
    [
        ([1, 0, 0], Kind.own_part, "only one of the 3 terms"),
        ([1, 1, 0], Kind.part_missing, "the term of rank 2 of tp is missing"),
        ([1, 2, 1], Kind.factor, "multiplied by [1.0, 2.0, 1.0]"),
    ],
)
def test_a_sum_without_some_of_its_terms(weights, kind, because):
    terms = list(numbers(3, ROWS, LENGTH, WIDTH))
    whole = torch.stack(terms).sum(0)
    found = sum(weight * term for weight, term in zip(weights, terms, strict=True))
    guess = kinds.as_sum([wrong(found, whole)], {"tp": terms})
    assert guess is not None and (guess.kind, guess.axes) == (kind, ("tp",))
    assert because in guess.because
    assert kinds.as_sum([wrong(found + numbers(1), whole)], {"tp": terms}) is None


def test_ranks_that_each_have_their_own_term():
    assert kinds.summed([[1.0, 0.0], [0.0, 1.0]], "cp").kind is Kind.own_part


def test_the_values_of_other_positions():
    whole = numbers(ROWS, LENGTH, WIDTH)
    guess = kinds.as_positions([wrong(whole.roll(1, 1), whole)])
    assert guess is not None and guess.kind is Kind.positions
    assert guess.because == "position 0 has the value of position 15"
    assert kinds.as_positions([wrong(whole.roll(1, 2), whole)]) is None


def test_the_value_of_other_rows():
    whole = numbers(ROWS, LENGTH, WIDTH)
    part = Part((torch.arange(2, 4), torch.arange(LENGTH), torch.arange(WIDTH)), ())
    guess = kinds.as_stale([wrong(whole[:2], whole, part)])
    assert guess is not None and guess.kind is Kind.stale and "from 2 have the values of those from 0" in guess.because
    assert kinds.as_stale([wrong(whole[:2] + 1, whole, part)]) is None


def test_rounding_is_small_and_has_no_structure():
    whole = numbers(ROWS, LENGTH, WIDTH)
    rounded = kinds.as_rounding([wrong(whole.bfloat16().double(), whole)])
    assert rounded is not None and rounded.kind is Kind.rounding
    added = whole + 1e-4 * numbers(WIDTH)  # the same in every token: the rank of the errors is 1
    assert kinds.as_rounding([wrong(added, whole)]) is None
    assert kinds.as_rounding([wrong(whole * 1.5, whole)]) is None


# which part of a tensor a rank has


def found_parts(name, whole, piece, degrees, place, rows=(0, ROWS)):
    trace = Trace(dict.fromkeys(MESH_AXES, 0) | place, rows, rows[1] - rows[0])
    return [*parts(name, whole, piece, (name, 0), trace, sizes(**degrees))]


def test_a_context_rank_has_a_chunk_from_the_head_and_one_from_the_tail():
    whole = numbers(ROWS, LENGTH, WIDTH)
    (part,) = found_parts("layers.0", whole, whole[:, :8], {"cp": 2}, {"cp": 1})
    assert part.index[1].tolist() == [*range(4, 12)] and part.axes == ("cp",)
    assert torch.equal(part.of(whole), whole[:, 4:12])


def test_a_tensor_rank_has_a_shard_of_the_sequence_or_of_the_features():
    whole = numbers(ROWS, LENGTH, WIDTH)
    (part,) = found_parts("norm", whole, whole[:, :8], {"tp": 2}, {"tp": 1})
    assert part.index[1].tolist() == [*range(8, 16)] and part.axes == ("tp",)
    (part,) = found_parts("layers.0.feed_forward.up", whole, whole[..., :3], {"tp": 2}, {"tp": 1})
    assert part.index[2].tolist() == [3, 4, 5] and part.axes == ("tp",)


def test_context_and_tensor_ranks_share_a_sequence():
    whole = numbers(ROWS, LENGTH, WIDTH)
    (part,) = found_parts("norm", whole, whole[:, :4], {"cp": 2, "tp": 2}, {"tp": 1})
    assert part.index[1].tolist() == [12, 13, 14, 15] and part.axes == ("cp", "tp")


@pytest.mark.parametrize(("rank", "columns"), [(0, range(129)), (1, range(129, 257))])
def test_a_vocabulary_that_no_degree_divides(rank, columns):
    whole = numbers(ROWS, LENGTH, 257)
    (part,) = found_parts("head", whole, whole[..., list(columns)], {"tp": 2}, {"tp": rank})
    assert part.index[2].tolist() == [*columns]
    assert not found_parts("head", whole, whole[..., :100], {"tp": 2}, {"tp": rank})


def test_neighbouring_ranks_share_a_head_of_keys():
    whole = numbers(ROWS, LENGTH, WIDTH)  # two heads of three features for four ranks
    found = [
        found_parts("layers.0.attention.wk", whole, whole[..., :3], {"tp": 4}, {"tp": rank})[0].index[2].tolist()
        for rank in range(4)
    ]
    assert found == [[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5]]


def test_a_rank_has_its_rows_of_the_batch():
    whole = numbers(ROWS, LENGTH, WIDTH)
    (part,) = found_parts("layers.0", whole, whole[2:], {"dp_shard": 2}, {"dp_shard": 1}, rows=(2, 4))
    assert part.index[0].tolist() == [2, 3] and part.axes == ()


# what the terms of a wrong gradient say


@pytest.mark.parametrize(
    ("weights", "kind", "axes", "because"),
    [
        ([[1, 1], [0, 0]], Kind.own_part, ("dp_shard",), "of 2 terms it has that of rank 0 of dp_shard alone"),
        ([[0, 1], [0, 1]], Kind.part_missing, (), "the terms of the microbatches 0 are missing"),
        ([[2, 2], [1, 1]], Kind.counted_again, ("dp_shard",), "its terms count 1 or 2 times"),
        ([[0.5, 0.5], [0.25, 0.25]], Kind.factor, ("dp_shard",), "along dp_shard are multiplied by [0.5, 0.25]"),
        ([[1, 1], [1, 0]], Kind.part_missing, ("dp_shard",), "of some ranks and microbatches are missing"),
    ],
)
def test_the_terms_of_a_gradient(weights, kind, axes, because):
    place = Place(sizes(dp_shard=2), 2)
    guess = of_weights(torch.tensor(weights, dtype=torch.float64), ("dp_shard", MICROBATCH), place)
    assert (guess.kind, guess.axes) == (kind, axes)
    assert because in guess.because
