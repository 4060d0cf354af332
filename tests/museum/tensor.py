"""Published bugs of tensor and sequence parallelism: sums over `tp` that are missing, doubled, or over other ranks."""

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate

from tests.museum.base import after, replaced
from tests.planted.base import Counter
from train.ranks import collectives, gradients
from train.ranks.gradients import local
from train.strategies.tensor import apply as tensor
from train.strategies.tensor import layers, mixture

Planted = AbstractContextManager[None]


def is_partial(grad: Any) -> bool:
    return isinstance(grad, DTensor) and any(isinstance(place, Partial) for place in grad.placements)


def final_norm_gradient_not_summed(counter: Counter) -> Planted:
    """The last norm before the head is left out of the list of weights whose gradients are summed over `tp`, although
    it too sees only a part of the sequence."""

    def apply_tp(target: Any) -> None:
        counter.calls += 1
        target.model.norm.__class__ = layers.ReplicatedRMSNorm

    return after(tensor, "apply_tp", apply_tp)


def norm_gradients_averaged(counter: Counter) -> Planted:
    """The gradients of the norms are averaged over the parts of the sequence; their sum is needed."""

    def make(original: Any) -> Any:
        def reduce_partial(parameters: Any) -> None:
            parameters = list(parameters)
            partial_ones = [p for p in parameters if is_partial(p.grad)]
            original(parameters)
            for p in partial_ones:
                counter.calls += 1
                local(p.grad).div_(p.grad.device_mesh.size())

        return reduce_partial

    return replaced(gradients, "reduce_partial", make)


def router_gradient_not_summed(counter: Counter) -> Planted:
    """Every tp rank has a part of each expert, so the router's gradient on a rank is one term of a sum; it is used as
    if it were the sum."""

    def forward(self: Any, x: Any) -> Any:
        counter.calls += 1
        return self.choose(x, self.weight.to_local())

    return replaced(layers.TensorParallelRouter, "forward", lambda original: forward)


def gathered_gradient_sliced(counter: Counter) -> Planted:
    """Tokens are gathered before the experts. The backward of the gather keeps this rank's slice of its own gradient,
    as if all ranks had computed the same, and does not sum over ranks."""

    def boundaries(group: Any, dim: int) -> Any:
        counter.calls += 1
        _, leave = tensor.boundaries(group, dim)
        return partial(collectives.all_gather_replicated, dim=dim, group=group), leave

    return replaced(mixture, "boundaries", lambda original: boundaries)


def head_input_gradient_not_summed(counter: Counter) -> Planted:
    """The gradient of the head's input is one term of a sum over `tp`; the result of the all-reduce is thrown away."""

    def count(module: Any, args: Any) -> None:
        counter.calls += 1

    def apply_tp(target: Any) -> None:
        target.model.head._forward_pre_hooks.clear()  # they sum the gradient over tp
        target.model.head.register_forward_pre_hook(count)

    return after(tensor, "apply_tp", apply_tp)


def gradient_summed_again(counter: Counter) -> Planted:
    """The backward of the all-reduce of activations sums the gradient over `tp` again, although every rank already has
    the whole gradient."""

    def make(original: Any) -> Any:
        def all_reduce(x: Any, group: Any) -> Any:
            counter.calls += 1
            return original(collectives.enter(x, group), group)

        return all_reduce

    return replaced(collectives, "all_reduce", make)


def split_weight_counted_on_one_rank(counter: Counter) -> Planted:
    """Weights that are split over `tp` but not marked so (here wk and wv) count in the norm with the part of the first
    tp rank only."""

    def make(original: Any) -> Any:
        def global_norm(grads: Any, *args: Any) -> Any:
            grads = list(grads)
            for i, grad in enumerate(grads):
                if grad.ndim == 2 and 2 * grad.shape[0] == grad.shape[1] and grad.device_mesh.get_local_rank() > 0:
                    counter.calls += 1
                    grads[i] = grad * 0.0
            return original(grads, *args)

        return global_norm

    return replaced(gradients, "global_norm", make)


def scattered_over_another_group(counter: Counter) -> Planted:
    """The embedding's vectors are summed and scattered over the data ranks, a group that has the size of the tp group,
    but other ranks."""

    def apply_tp(target: Any) -> None:
        counter.calls += 1
        other = target.mesh["dp_shard"].get_group()
        embed = target.model.embed
        embed.leave = partial(embed.leave, group=other)

    return after(tensor, "apply_tp", apply_tp)


def only_first_chunk_summed(counter: Counter) -> Planted:
    """Ranks share a KV head. Its gradients are summed in the first of a rank's stages only (`models[0]`), not in the
    others of an interleaved pipeline."""

    def make(original: Any) -> Any:
        def reduce_partial(parameters: Any) -> None:
            parameters = list(parameters)
            shared = [p for p in parameters if is_partial(p.grad) and p.ndim == 2]
            for p in shared[len(shared) // 2 :]:
                counter.calls += 1
                places = [Replicate() if isinstance(place, Partial) else place for place in p.grad.placements]
                p.grad = DTensor.from_local(p.grad.to_local(), p.grad.device_mesh, places, run_check=False)
            original(parameters)

        return reduce_partial

    return replaced(gradients, "reduce_partial", make)


def tensor_ranks_read_other_rows(counter: Counter) -> Planted:
    """The ranks of a tp group share the work on the same sequences, but the loader gives each its own."""
    from train.step import Step

    def make(original: Any) -> Any:
        def call(self: Any, tokens: Any, targets: Any, *, lr: float) -> Any:
            if self.mesh["tp"].get_local_rank() > 0:
                counter.calls += 1
                tokens, targets = torch.flip(tokens, (0,)), torch.flip(targets, (0,))
            return original(self, tokens, targets, lr=lr)

        return call

    return replaced(Step, "__call__", make)


BUGS = (
    final_norm_gradient_not_summed,
    norm_gradients_averaged,
    router_gradient_not_summed,
    gathered_gradient_sliced,
    head_input_gradient_not_summed,
    gradient_summed_again,
    split_weight_counted_on_one_rank,
    scattered_over_another_group,
    only_first_chunk_summed,
    tensor_ranks_read_other_rows,
)
