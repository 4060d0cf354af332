"""Plants whose place in the lab spmd_types cannot reach, as small programs: right, and with the mistake.

Each function computes on one axis of two ranks what the lab computes in that place, in float64, and returns what the
mistake makes wrong. The types of its inputs are written down with `assert_type`. The two forms differ in nothing but
the mistake, and `wrong` is the only condition.
"""

from collections.abc import Callable

import spmd_types as spmd
import torch
import torch.distributed as dist
from spmd_types import I, P, R, S, V
from torch import Tensor
from torch.distributed import ProcessGroup

ROWS, WIDTH, RATE = 4, 3, 0.1
Program = Callable[[ProcessGroup, bool], Tensor]


def _own(group: ProcessGroup, *shape: int, rank: int | None = None) -> Tensor:
    """Other rows on every rank."""
    generator = torch.Generator().manual_seed(group.rank() if rank is None else rank)
    return spmd.assert_type(torch.randn(*shape, generator=generator, dtype=torch.float64), {group: S(0)})


def _same(group: ProcessGroup, *shape: int) -> Tensor:
    """The same tensor on all ranks, for example a weight."""
    generator = torch.Generator().manual_seed(7)
    return spmd.assert_type(torch.randn(*shape, generator=generator, dtype=torch.float64), {group: R})


def _gradient(group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """A weight, and this rank's term of its gradient, from rows of its own. The type of the weight's gradient follows
    from that of the weight (R: it is partial), but spmd_types does not put it on `.grad`."""
    weight = _same(group, WIDTH, WIDTH).requires_grad_()
    loss = (_own(group, ROWS, WIDTH) @ weight).square().sum()
    spmd.reinterpret(loss, group, src=V, dst=P).backward()
    assert weight.grad is not None
    return weight.detach(), spmd.assert_type(weight.grad, {group: P})


def never_synchronised(group: ProcessGroup, wrong: bool) -> Tensor:
    weight, grad = _gradient(group)
    if not wrong:
        grad = spmd.all_reduce(grad, group, dst=R)
    return weight - RATE * grad


def rank_left_out(group: ProcessGroup, wrong: bool) -> Tensor:
    weight, grad = _gradient(group)
    if wrong and group.rank() == 1:
        grad = grad * 0.0
    return weight - RATE * spmd.all_reduce(grad, group, dst=R)


def mean_of_means(group: ProcessGroup, wrong: bool) -> Tensor:
    """The sum of the losses is declared partial at once, not only before the backward."""
    losses = _own(group, ROWS).square()
    counted = (losses > 0.1).sum().to(losses.dtype)
    total = spmd.reinterpret(losses.sum(), group, src=V, dst=P)
    if not wrong:
        counted = spmd.all_reduce(counted, group, dst=R)
    return spmd.all_reduce(total / counted, group, dst=I)


def loss_scaled_by_cp(group: ProcessGroup, wrong: bool) -> Tensor:
    weight, grad = _gradient(group)
    if wrong:
        grad = grad * group.size()
    return weight - RATE * spmd.all_reduce(grad, group, dst=R)


def labels_shifted_after_sharding(group: ProcessGroup, wrong: bool) -> Tensor:
    tokens = _same(group, ROWS)
    if wrong:
        labels = spmd.convert(tokens, group, src=R, dst=S(0)).roll(-1, 0)
    else:
        labels = spmd.convert(tokens.roll(-1, 0), group, src=R, dst=S(0))
    return labels * spmd.convert(tokens, group, src=R, dst=S(0))


def rope_from_zero(group: ProcessGroup, wrong: bool) -> Tensor:
    x = spmd.convert(_same(group, ROWS), group, src=R, dst=S(0))
    if wrong:
        positions = torch.arange(ROWS // group.size(), dtype=x.dtype)
    else:
        positions = spmd.convert(torch.arange(ROWS, dtype=x.dtype), group, src=R, dst=S(0))
    return x * positions.cos()


def expert_gradients_times_ep(group: ProcessGroup, wrong: bool) -> Tensor:
    """Tokens travel to this rank's expert, so the gradient of its weight is whole, and of one rank only."""
    expert = spmd.assert_type(_own(group, WIDTH, WIDTH).requires_grad_(), {group: V})
    rows = spmd.all_to_all(_own(group, ROWS, WIDTH), group, src=S(0), dst=S(0))
    back = spmd.all_to_all(rows @ expert, group, src=S(0), dst=S(0))
    spmd.reinterpret(back.square().sum(), group, src=V, dst=P).backward()
    grad = spmd.assert_type(expert.grad, {group: V})
    return expert.detach() - RATE * (grad * group.size() if wrong else grad)


def router_learns_from_the_auxiliary_loss_only(group: ProcessGroup, wrong: bool) -> Tensor:
    """Gates are gathered: differentiably, or by the collective of torch.distributed, which autograd does not follow."""
    router = _own(group, ROWS).requires_grad_()
    gates = router.sigmoid()
    if wrong:
        gathered = spmd.assert_type(torch.empty(2 * ROWS, dtype=gates.dtype), {group: R})
        dist.all_gather_into_tensor(gathered, gates.detach(), group=group)
    else:
        gathered = spmd.all_gather(gates, group, src=S(0), dst=R)
    main = (gathered * _own(group, 2 * ROWS, rank=group.rank() + 2)).sum()
    spmd.reinterpret(main + router.sum(), group, src=V, dst=P).backward()
    return spmd.assert_type(router.grad, {group: V})


def aux_loss_on_every_tp_rank(group: ProcessGroup, wrong: bool) -> Tensor:
    """Every rank has the whole auxiliary loss, and one term of the main loss."""
    main = spmd.reinterpret(_own(group, ROWS).sum(), group, src=V, dst=P)
    auxiliary = _same(group, ROWS).square().sum()
    loss = main + (auxiliary if wrong else spmd.convert(auxiliary, group, src=R, dst=P))
    return spmd.all_reduce(loss, group, dst=I)


def norm_counts_replicas(group: ProcessGroup, wrong: bool) -> Tensor:
    shard, whole = _own(group, ROWS).square().sum(), _same(group, ROWS).square().sum()
    if wrong:
        whole = spmd.all_reduce(whole, group, dst=R)
    return (spmd.all_reduce(shard, group, dst=R) + whole).sqrt()


def norm_of_own_shard(group: ProcessGroup, wrong: bool) -> Tensor:
    grad = _own(group, ROWS)
    squares = grad.square().sum()
    if not wrong:
        squares = spmd.all_reduce(squares, group, dst=R)
    norm = squares.sqrt()
    spmd.assert_type(norm, {group: R})
    return grad / norm


def tied_gradients_not_summed(group: ProcessGroup, wrong: bool) -> Tensor:
    """The first and the last stage of a pipeline have a copy of one table, and each has a term of its gradient."""
    table, grad = _gradient(group)
    if not wrong:
        grad = spmd.all_reduce(grad, group, dst=R)
    return table - RATE * grad


def only_first_rank_updates(group: ProcessGroup, wrong: bool) -> Tensor:
    weight = _same(group, ROWS)
    shard = spmd.convert(weight, group, src=R, dst=S(0))
    if not (wrong and group.rank() > 0):
        shard = shard - RATE * _own(group, ROWS // group.size())
    return spmd.all_gather(shard, group, src=S(0), dst=R)


def evaluation_of_own_rows(group: ProcessGroup, wrong: bool) -> Tensor:
    total = _own(group, ROWS).sum()
    if not wrong:
        total = spmd.all_reduce(total, group, dst=R)
    return spmd.assert_type(total, {group: R})


PROGRAMS: dict[str, Program] = {
    program.__name__: program
    for program in (
        never_synchronised,
        rank_left_out,
        mean_of_means,
        loss_scaled_by_cp,
        labels_shifted_after_sharding,
        rope_from_zero,
        expert_gradients_times_ep,
        router_learns_from_the_auxiliary_loss_only,
        aux_loss_on_every_tp_rank,
        norm_counts_replicas,
        norm_of_own_shard,
        tied_gradients_not_summed,
        only_first_rank_updates,
        evaluation_of_own_rows,
    )
}
