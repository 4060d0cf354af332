"""Published bugs of context parallelism: positions, labels, scales, and the backward of ring attention."""

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch

from tests.museum.base import after, replaced
from tests.planted.base import Counter
from train.config.fields import IGNORE_INDEX
from train.ranks import collectives
from train.strategies.context import apply as context

Planted = AbstractContextManager[None]


def labels_shifted_after_sharding(counter: Counter) -> Planted:
    """Every rank makes the labels of its tokens by shifting its own tokens: at the end of each of its chunks, the next
    token of the sequence is on another rank, and a wrong one takes its place."""

    def shard_targets(module: Any, args: Any, *, positions: Any) -> Any:
        counter.calls += 1
        return args[0], args[1][:, positions.roll(-1) - 1]  # the target at p - 1 is the token at p

    return replaced(context, "shard_targets", lambda original: shard_targets)


def loss_scaled_by_cp(counter: Counter) -> Planted:
    """The loss is multiplied by `cp` before the backward, to undo a mean over `cp` that is not taken."""

    def apply_cp(model: Any, mesh: Any, **options: Any) -> None:
        def scale(module: Any, args: Any, loss: Any) -> None:
            counter.calls += 1
            if loss.requires_grad:
                loss.register_hook(lambda grad: grad * mesh.size())

        model.loss.register_forward_hook(scale)

    return after(context, "apply_cp", apply_cp)


def own_shard_of_tokens_counted(counter: Counter) -> Planted:
    """Each cp rank divides its loss by the number of valid tokens of its own part of the sequence, and the ranks' means
    are averaged."""

    def apply_cp(model: Any, mesh: Any, **options: Any) -> None:
        def mean(module: Any, args: Any, loss: Any) -> Any:
            counter.calls += 1
            own = (args[1] != IGNORE_INDEX).sum()
            return loss * collectives.sum_of(own, mesh.get_group()) / (mesh.size() * own.clamp(min=1))

        model.loss.register_forward_hook(mean)

    return after(context, "apply_cp", apply_cp)


def ring_backward_with_own_keys(counter: Counter) -> Planted:
    """The forward saved the keys and values of the first step of the ring only. The backward sends keys and values
    round the ring, but computes every step with the saved ones."""

    def make(original: Any) -> Any:
        def backward(ctx: Any, grad: Any) -> Any:
            _, k, v, *_ = ctx.saved_tensors
            steps_left = [ctx.group.size() - 1]
            arrived = context.arrived

            def stale(message: Any, like: Any) -> Any:
                received = arrived(message, like)
                if steps_left[0] > 0:
                    counter.calls += 1
                    steps_left[0] -= 1
                    received[-1] = torch.stack((k, v))
                return received

            with mock.patch.object(context, "arrived", stale):
                return original(ctx, grad)

        return staticmethod(backward)

    return replaced(context._Ring, "backward", make)


def backward_of_each_block_alone(counter: Counter) -> Planted:
    """The backward of a block of keys uses the block's own output and log-sum-exp; those of all blocks together are
    needed."""

    def make(original: Any) -> Any:
        def attend_backward(grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, **options: Any) -> Any:
            counter.calls += 1
            return original(grad, q, k, v, *context.attend(q, k, v, **options), **options)

        return attend_backward

    return replaced(context, "attend_backward", make)


def tokens_interleaved_by_all_to_all(counter: Counter) -> Planted:
    """The reshape after the all-to-all puts the ranks' dimension inside the tokens' instead of outside: the tokens of
    the sequence are in a wrong order for attention."""

    def in_sequence(x: Any) -> Any:
        counter.calls += 1
        return x.movedim(0, -2).flatten(-3, -2)

    return replaced(context, "in_sequence", lambda original: in_sequence)


def rope_of_a_contiguous_part(counter: Counter) -> Planted:
    """A rank's tokens are two chunks, one from each half of the sequence, but its table of rotations is cut as one
    contiguous part."""

    def make(original: Any) -> Any:
        def shard_input(model: Any, args: Any, *, positions: Any) -> Any:
            counter.calls += 1
            x, _ = original(model, args, positions=positions)
            length = len(positions)
            rank = int(positions[0]) // (length // 2)
            return x, torch.arange(rank * length, (rank + 1) * length, device=positions.device)

        return shard_input

    return replaced(context, "shard_input", make)


def blocks_rounded_before_merging(counter: Counter) -> Planted:
    """The attention kernel returns each block's output in bf16, so the merged output has the rounding error of every
    step of the ring."""

    def make(original: Any) -> Any:
        def accumulate(out: Any, lse: Any, rows: Any, block: Any) -> None:
            counter.calls += 1
            original(out, lse, rows, (block[0].bfloat16(), block[1]))

        return accumulate

    return replaced(context, "accumulate", make)


BUGS = (
    labels_shifted_after_sharding,
    loss_scaled_by_cp,
    own_shard_of_tokens_counted,
    ring_backward_with_own_keys,
    backward_of_each_block_alone,
    tokens_interleaved_by_all_to_all,
    rope_of_a_contiguous_part,
    blocks_rounded_before_merging,
)
