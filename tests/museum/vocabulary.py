"""Published bugs of a vocabulary that is split over `tp`: in the embedding, the head and the loss."""

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch.nn import functional as F

from tests.museum.base import after, replaced
from tests.planted.base import Counter
from train.ranks.gradients import local
from train.strategies.tensor import apply as tensor
from train.strategies.tensor import layers

Planted = AbstractContextManager[None]


def ids_of_other_ranks_not_zeroed(counter: Counter) -> Planted:
    """The ids of other ranks' rows are set to row 0 for the look-up. The mask that should set their vectors to zero
    afterwards is computed from the ids that were already changed, so it is empty."""

    def forward(self: Any, tokens: Any) -> Any:
        counter.calls += 1
        table = local(self.weight)
        row = tokens - self.first_row
        row = row.masked_fill((row < 0) | (row >= table.shape[0]), 0)
        elsewhere = (row < 0) | (row >= table.shape[0])
        return self.leave(F.embedding(row, table).masked_fill(elsewhere.unsqueeze(-1), 0.0))

    return replaced(layers.VocabParallelEmbedding, "forward", lambda original: forward)


def parallel_loss_of_gathered_logits(counter: Counter) -> Planted:
    """The logits are gathered, and then go into the loss that expects a shard of the vocabulary: the sum of
    exponentials counts each of them tp times, and only the first rank finds the targets."""

    def apply_tp(target: Any) -> None:
        counter.calls += 1
        model, group = target.model, target.mesh["tp"].get_group()
        vocab_size = model.config.vocab_size
        gather = partial(tensor._gather_logits, vocab_size=vocab_size, group=group)
        model.head.register_forward_hook(gather)
        model.loss = layers.VocabParallelCrossEntropy(group.rank() * vocab_size, group)

    return after(tensor, "apply_tp", apply_tp)


def gradient_only_where_the_target_is(counter: Counter) -> Planted:
    """The logits of a token get a gradient only on the rank that has the token's target. On the others the softmax has
    no way back, because the all-reduce of the loss is not differentiable."""

    def make(original: Any) -> Any:
        def backward(ctx: Any, grad: Any) -> Any:
            counter.calls += 1
            here = ctx.saved_tensors[3]
            logits, *others = original(ctx, grad)
            return logits * here.unsqueeze(-1), *others

        return staticmethod(backward)

    return replaced(layers._VocabParallelLoss, "backward", make)


BUGS = (ids_of_other_ranks_not_zeroed, parallel_loss_of_gathered_logits, gradient_only_where_the_target_is)
