"""Published bugs of DeepSpeed and of those who call it: who divides by the number of microbatches."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from tests.museum.base import after, replaced
from tests.planted.base import Counter

Planted = AbstractContextManager[None]


def microbatches_summed(counter: Counter) -> Planted:
    """The pipeline's gradients are the sum over microbatches where the loss was scaled for a mean: they are m times too
    large, and the loss that is reported is right."""
    from train.strategies.deepspeed import pipe

    def make(original: Any) -> Any:
        def loss_of(self: Any, logits: Any, targets: Any) -> Any:
            loss = original(self, logits, targets)
            if loss.requires_grad:
                counter.calls += 1
                loss.register_hook(lambda grad: grad * self.num_microbatches)
            return loss

        return loss_of

    return replaced(pipe.PipeStep, "loss_of", make)


def divided_by_microbatches_again(counter: Counter) -> Planted:
    """The loss is already divided by the number of all tokens, and DeepSpeed's `backward` divides it by the number of
    microbatches too."""
    from train.strategies.deepspeed import engine

    def initialise(self: Any, *args: Any, **options: Any) -> None:
        backward = self.engine.backward

        def scaled(loss: Any, scale_wrt_gas: bool) -> Any:
            counter.calls += 1
            return backward(loss)

        self.engine.backward = scaled

    return after(engine.EngineStep, "initialise", initialise)


def labels_of_another_microbatch(counter: Counter) -> Planted:
    """The last stage reads the next microbatch's labels before it computes the loss of this one."""
    from train.strategies.deepspeed import pipe

    def batches(self: Any, tokens: Any, targets: Any) -> Any:
        counter.calls += 1
        rows = self.config.train.micro_batch_size
        return zip(tokens.split(rows), targets.roll(-rows, 0).split(rows), strict=True)

    return replaced(pipe.PipeStep, "batches", lambda original: batches)


@contextmanager
def scaled_by_every_stage(counter: Counter) -> Iterator[None]:
    """Every stage divides the gradient of its output by the number of microbatches, also the stages to which the
    gradient comes from the next one, which has divided it before."""
    from train.strategies.deepspeed import engine, pipe

    steps: list[Any] = []

    def make(original: Any) -> Any:
        def forward(self: Any, x: Any) -> Any:
            out, step = original(self, x), steps[-1]
            pp = step.mesh["pp"]
            if out.requires_grad and pp.get_local_rank() < pp.size() - 1:
                counter.calls += 1
                out.register_hook(lambda grad: grad / step.num_microbatches)
            return out

        return forward

    def init(self: Any, *args: Any) -> None:
        steps.append(self)

    with after(engine.EngineStep, "__init__", init), replaced(pipe.BlockLayer, "forward", make):
        yield


def clipped_by_the_first_stage(counter: Counter) -> Planted:
    """The parameters are not marked as different on every stage, so DeepSpeed without ZeRO counts only the first
    stage's in the norm that it clips by."""
    from train.strategies.deepspeed import pipe

    def mark_as_own(parameters: Any) -> None:
        counter.calls += 1

    return replaced(pipe, "mark_as_own", lambda original: mark_as_own)


BUGS = (
    microbatches_summed,
    divided_by_microbatches_again,
    labels_of_another_microbatch,
    scaled_by_every_stage,
    clipped_by_the_first_stage,
)
