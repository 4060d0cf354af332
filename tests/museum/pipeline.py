"""Published bugs of pipelines: scales per microbatch, stale gradients, tied weights, and sums over stages."""

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

from tests.museum.base import replaced
from tests.planted.base import Counter
from train.config.plan import Plan
from train.ranks import gradients
from train.ranks.gradients import local
from train.strategies.data import apply as data
from train.strategies.pipeline import stages

Planted = AbstractContextManager[None]


def norm_of_own_stage(counter: Counter) -> Planted:
    """Every stage computes the norm of its own gradients, and clips by it: there is no sum over `pp`."""

    def make(original: Any) -> Any:
        def global_norm(grads: Any, pipeline: Any, device: Any) -> Any:
            counter.calls += 1
            return original(grads, None, device)

        return global_norm

    return replaced(gradients, "global_norm", make)


def scaled_after_every_microbatch(counter: Counter) -> Planted:
    """Whenever a microbatch has added its gradient, all that has been accumulated so far is divided by the number of
    microbatches, so that the sum becomes a moving average."""

    def make(original: Any) -> Any:
        def backward_one_chunk(self: Any, *args: Any, **options: Any) -> None:
            original(self, *args, **options)
            for p in self.submod.parameters():
                if p.grad is not None:
                    counter.calls += 1
                    p.grad /= self.chunks

        return backward_one_chunk

    return replaced(stages.RecordedStage, "backward_one_chunk", make)


def loss_normalised_for_the_log_only(counter: Counter) -> Planted:
    """The schedule runs its backward from the sum of the losses; only the number that is logged is divided by the
    number of valid tokens."""

    def make(original: Any) -> Any:
        def pipelined(*args: Any) -> Any:
            forward_backward, evaluate = original(*args)

            def unscaled(tokens: Any, targets: Any, inverse_num_valid: Any) -> Any:
                counter.calls += 1
                return forward_backward(tokens, targets, torch.ones_like(inverse_num_valid)) * inverse_num_valid

            return unscaled, evaluate

        return pipelined

    return replaced(stages, "pipelined", make)


def only_last_microbatch_kept(counter: Counter) -> Planted:
    """The stage is set up again before each microbatch, which deletes the gradients of those before."""

    def make(original: Any) -> Any:
        def backward_one_chunk(self: Any, chunk: int, *args: Any, **options: Any) -> None:
            for p in self.submod.parameters():
                counter.calls += p.grad is not None
                p.grad = None
            original(self, chunk, *args, **options)

        return backward_one_chunk

    return replaced(stages.RecordedStage, "backward_one_chunk", make)


def gradient_of_another_microbatch_sent(counter: Counter) -> Planted:
    """A stage has one place for the gradient that it will send to the stage before, so another microbatch's gradient
    may be in it when it is sent; here that of the microbatch before."""
    kept: dict[int, Any] = {}

    def get_bwd_send_ops(self: Any, chunk: int) -> Any:
        if not self.is_first:
            own = self.bwd_cache[chunk]
            if chunk > 0:
                counter.calls += 1
                self.bwd_cache[chunk] = kept[self.stage_index]
            kept[self.stage_index] = own
        return PipelineStage.get_bwd_send_ops(self, chunk)

    return replaced(stages.RecordedStage, "get_bwd_send_ops", lambda original: get_bwd_send_ops)


def evaluation_divided_again(counter: Counter) -> Planted:
    """The losses of an evaluation are sums, but are averaged over the microbatches as if they were means."""

    def make(original: Any) -> Any:
        def pipelined(parts: Any, tied: Any, mesh: Any, config: Any, keys: Any) -> Any:
            forward_backward, evaluate = original(parts, tied, mesh, config, keys)

            def averaged(tokens: Any, targets: Any) -> Any:
                counter.calls += 1
                return evaluate(tokens, targets) / Plan(config, mesh.size()).num_microbatches

            return forward_backward, averaged

        return pipelined

    return replaced(stages, "pipelined", make)


def tied_copies_misaligned(counter: Counter) -> Planted:
    """The first and the last stage add each other's gradient of the tied embedding, but the two lie at different
    offsets of their buffers: every row gets the gradient of its neighbour."""

    def make(original: Any) -> Any:
        def sum_shared(shared: Any, device: Any) -> None:
            for item in shared:
                counter.calls += 1
                term = local(item.parameter.grad)
                own = term.clone()
                original([item], device)
                term.copy_(own + (term - own).roll(1, 0))

        return sum_shared

    return replaced(gradients, "sum_shared", make)


def one_tied_copy_summed(counter: Counter) -> Planted:
    """Only the last stage gets the sum of both gradients of the tied embedding; the first one updates its copy with its
    own, and the copies drift apart."""

    def make(original: Any) -> Any:
        def sum_shared(shared: Any, device: Any) -> None:
            for item in shared:
                term = local(item.parameter.grad)
                own = term.clone()
                original([item], device)
                if item.counted:  # the copy of the first stage
                    counter.calls += 1
                    term.copy_(own)

        return sum_shared

    return replaced(gradients, "sum_shared", make)


def last_stage_not_synchronised(counter: Counter) -> Planted:
    """The flag that starts the sum over the data ranks is set in the last phase of 1F1B, which the last stage does not
    have: its ranks keep their own gradients."""

    def make(original: Any) -> Any:
        def sum_bucket(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            if dist.get_rank() < dist.get_world_size() // 2:  # pp is the outermost axis
                return original(group, bucket)
            counter.calls += 1
            done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        return sum_bucket

    return replaced(data, "sum_bucket", make)


BUGS = (
    norm_of_own_stage,
    scaled_after_every_microbatch,
    loss_normalised_for_the_log_only,
    only_last_microbatch_kept,
    gradient_of_another_microbatch_sent,
    evaluation_divided_again,
    tied_copies_misaligned,
    one_tied_copy_summed,
    last_stage_not_synchronised,
)
