"""What a checkpoint holds of DeepSpeed's engines: whole tensors by the lab's names, so that any layout can read them.

ZeRO keeps weights and moments in flat partitions that no other layout has. To save, each tensor is gathered by
DeepSpeed's own functions, one at a time, and the ranks take turns in keeping it. To load, every rank reads all tensors
into the host's memory, and takes its part of each.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.config.schema import Optimiser
from train.config.strategy import Read
from train.model.transformer import Transformer
from train.ranks.state import Piece

if TYPE_CHECKING:
    from train.strategies.deepspeed.engine import EngineStep

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, by torch's names
COUNT = "step"  # of AdamW: the number of updates, one for each parameter


def kinds_of(step: EngineStep) -> tuple[str, ...]:
    """The tensors that the optimiser keeps for a parameter, by torch's names."""
    optim = step.config.optim
    if optim.name is Optimiser.adamw:
        return MOMENTS
    return ("momentum_buffer",) if optim.momentum > 0 else ()


def saved(step: EngineStep) -> Iterator[Piece]:
    """The pieces of this rank: whole tensors. Collective over the world."""
    _make_state(step)
    for kind in ("parameter", *kinds_of(step)):
        for i, (name, full) in enumerate(step.full(_getter(step, kind))):
            if i % dist.get_world_size() == dist.get_rank():
                value = full.detach().to("cpu", copy=True)
                yield Piece(name, kind, tuple(value.shape), (0,) * value.ndim, value, copied=True)
    if step.config.optim.name is Optimiser.adamw:
        count = next(one[COUNT] for one in _inner(step).state.values())
        for name in step.parameters:
            yield Piece(name, COUNT, (), (), count.to("cpu", copy=True), copied=True)


def restore(step: EngineStep, read: Read, known: Container[str]) -> None:
    """Fill the engine's state from a checkpoint with the keys `known`; what it does not have is zero. Every rank reads
    the whole state, in the host's memory."""
    skeleton = Transformer(step.config.model, param_dtype=torch.float32, compute_dtype=torch.float32)
    kinds = ("parameter", *kinds_of(step))
    pieces = {}
    for name, p in skeleton.named_parameters():
        for kind in kinds:
            pieces[name, kind] = Piece(name, kind, tuple(p.shape), (0,) * p.ndim, torch.zeros(p.shape))
    count = Piece(next(iter(step.parameters)), COUNT, (), (), torch.zeros(()))
    read([piece for piece in (*pieces.values(), count) if piece.key in known])
    _make_state(step)
    for name, p in step.parameters.items():
        for kind in kinds:
            _put(step, p, kind, step.part_of(p, pieces[name, kind].tensor).to(p.device))
    for state in _inner(step).state.values():
        if COUNT in state:
            state[COUNT].copy_(count.tensor)


def _inner(step: EngineStep) -> Any:
    """torch's optimiser, which DeepSpeed's may wrap."""
    return getattr(step.engine.optimizer, "optimizer", step.engine.optimizer)


def _getter(step: EngineStep, kind: str) -> Callable[[nn.Parameter], Tensor | None]:
    get, utils = _inner(step).state, step.deepspeed.utils
    if kind == "parameter":
        return lambda p: p.detach() if (full := utils.safe_get_full_fp32_param(p)) is None else full
    return lambda p: get[p][kind] if p in get else utils.safe_get_full_optimizer_state(p, kind)


def _make_state(step: EngineStep) -> None:
    """Make the optimiser's state, as its first step would, where it does not exist yet, and link it to the parameters.

    ZeRO 1 and 2 link it themselves, but after the update of their first group of parameters, when the second group has
    no state yet (deepspeed 0.19.8).
    """
    inner = _inner(step)
    flats = getattr(step.engine.optimizer, "fp32_partitioned_groups_flat", None)  # stage 3 has no others between steps
    for group in inner.param_groups:
        for p in group["params"] if flats is None else flats:
            if not inner.state.get(p):
                inner.state[p] = {kind: torch.zeros_like(p) for kind in kinds_of(step)}
                if step.config.optim.name is Optimiser.adamw:
                    device = p.device if group.get("fused") else "cpu"
                    inner.state[p][COUNT] = torch.zeros((), dtype=torch.float32, device=device)
    for p in step.parameters.values():
        if (mapping := getattr(p, "_hp_mapping", None)) is not None:
            (flat,) = inner.param_groups[mapping.param_group_index]["params"]
            mapping.set_optim_state_fragment(flat, inner.state[flat])


def _put(step: EngineStep, p: nn.Parameter, kind: str, value: Tensor) -> None:
    """Give the rank its part of a tensor: in the weight that it computes with, in the optimiser's copy of the weight,
    and in the optimiser's state."""
    state, utils = _inner(step).state, step.deepspeed.utils
    key = None if kind == "parameter" else kind
    if hasattr(p, "ds_id"):  # stage 3: every rank has an equal part of the flat tensor, filled up at its end
        partition = p.ds_tensor  # type: ignore[attr-defined]
        size, rank = partition.numel(), step.mesh["dp_shard"].get_local_rank()
        flat = torch.zeros(size * step.mesh["dp_shard"].size(), dtype=value.dtype, device=value.device)
        flat[: value.numel()] = value.flatten()
        own = flat[rank * size : (rank + 1) * size]
        if key is None:
            utils.safe_set_local_fp32_param(p, own)
            partition.data.copy_(own)
            if p.numel() == value.numel():  # it is not sharded between steps (`strategy.whole_below`)
                p.data.copy_(value)
        else:
            utils.safe_set_local_optimizer_state(p, own, key)
    elif hasattr(p, "_hp_mapping"):  # stages 1 and 2
        if key is None:
            p.data.copy_(value)
            utils.safe_set_full_fp32_param(p, value)
        else:
            utils.safe_set_full_optimizer_state(p, value, key)
    elif key is None:
        p.data.copy_(value)
    else:
        state[p][key].copy_(value)
