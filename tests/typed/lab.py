"""The lab's own code under spmd_types, without a change in it: what its collectives do to types is said here."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import spmd_types as spmd
from spmd_types import I, R, S, V, rules
from spmd_types.checker import typecheck
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from train.config.schema import Config
from train.data.corpus import load_corpus
from train.model import moe
from train.model.transformer import Transformer, dtypes
from train.ranks import collectives, gradients
from train.ranks.distributed import own_rows
from train.strategies.tensor import layers

Hook = Callable[..., Any]


def _enter(*, x: Tensor, group: ProcessGroup) -> Any:
    return rules.convert(x, group, src=I, dst=R)


def _reduce(*, x: Tensor, group: ProcessGroup) -> Any:
    return rules.all_reduce(x, group, src=V, dst=I)


def _gather(*, x: Tensor, dim: int, group: ProcessGroup) -> Any:
    return rules.all_gather(x, group, src=S(dim), dst=R)


def _gather_replicated(*, x: Tensor, dim: int, group: ProcessGroup) -> Any:
    return rules.all_gather(x, group, src=S(dim), dst=I)


def _reduce_scatter(*, x: Tensor, dim: int, group: ProcessGroup) -> Any:
    return rules.reduce_scatter(x, group, src=V, dst=S(dim))


def _loss(outputs: Tensor, *, logits_NV: Tensor, targets_N: Tensor, group: ProcessGroup) -> None:
    """The loss of a shard of the vocabulary: what is inside is not looked at."""
    spmd.assert_type(logits_NV, {group: V})
    rules.ignore(targets_N)
    spmd.assert_type(outputs, {group: I})


HOOKS: dict[type, Hook] = {
    collectives._Enter: _enter,
    collectives._Reduce: _reduce,
    collectives._Gather: _gather,
    collectives._GatherReplicated: _gather_replicated,
    collectives._ReduceScatter: _reduce_scatter,
    layers._VocabParallelLoss: _loss,
}
# they send nothing: their results have the types of their inputs
LOCAL: tuple[Any, ...] = (moe._Observe, moe._GatherRows)


class _OfTorch:
    """Weights by `DTensor.to_local`, whose types the checker knows; the lab's own function computes the same."""

    @staticmethod
    def apply(x: Any, spec: Any) -> Tensor:
        return x.to_local(grad_placements=spec.placements)


@contextmanager
def declared() -> Iterator[None]:
    """Tell spmd_types the types of the lab's autograd functions."""
    with ExitStack() as stack:
        for function in LOCAL:
            spmd.register_local_autograd_function(function)
        for function, hook in HOOKS.items():
            stack.enter_context(mock.patch.object(function, "spmd_typecheck", staticmethod(hook), create=True))
        stack.enter_context(mock.patch.object(gradients, "_Local", _OfTorch))
        yield


def step(config: Config, mesh: DeviceMesh) -> None:
    """One step of tensor parallelism, with its forward and the start of its backward under the type checker. Weights
    need no annotation: their types follow from how `DTensor.to_local` is called. Raises SpmdTypeError."""
    model = Transformer(config.model, **dtypes(config.precision))
    made: Any = config.strategy.build(model, mesh, config)
    untyped = made.forward_backward

    def typed(*batch: Tensor) -> Tensor:
        with declared(), spmd.set_current_mesh(mesh), typecheck():
            for x in (*batch, model.rope, *model.buffers()):
                spmd.assert_type(x, R)
            return untyped(*batch)

    made.forward_backward = typed
    size = config.train.global_batch_size
    made(*load_corpus(config).batch(1, size, own_rows(mesh, size)), lr=0.0)
