"""AdamW whose moments are kept in 8 bits, in blocks of 256 neighbouring elements (Dettmers et al. 2022), by torchao.

The state and its codes are torchao's. Its own step compiles a graph for every shape of a parameter, in every process;
this one computes the same formula without a compiler, in the parameter's own type. It takes AT_ONCE elements at a time,
because quantising makes many temporary numbers for each. Both use private parts of torchao (0.18).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torchao.optim import AdamW8bit

from train.config.groups.optim import AT_ONCE
from train.ranks.state import whole


class EightBitAdamW(AdamW8bit):
    """torchao's AdamW8bit without its compiler. Parameters that are small, or that blocks do not divide, have whole
    moments (`strategies.memory.optimiser_bytes`)."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)

    def _update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2), lr = self.state[p], group["betas"], float(group["lr"])
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = self._new_buffer(p, True)
            state["exp_avg_sq"] = self._new_buffer(p, False)
        state["step"] += 1
        count = float(state["step"])
        update = partial(
            _update_part,
            betas=(beta1, beta2),
            eps=group["eps"],
            root=(1 - beta2**count) ** 0.5,
            rate=lr / (1 - beta1**count),
            keep=1 - lr * group["weight_decay"],
        )
        for part in _parts(p, grad, state["exp_avg"], state["exp_avg_sq"]):
            update(*part)


def _parts(p: Tensor, grad: Tensor, *moments: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of the same elements of all tensors, AT_ONCE at a time; or the tensors, where no view is possible."""
    if p.numel() <= AT_ONCE or not p.is_contiguous():
        yield p, grad, *moments
        return
    grad = grad.contiguous()
    for start in range(0, p.numel(), AT_ONCE):
        yield tuple(_part(tensor, start) for tensor in (p, grad, *moments))


def _part(tensor: Tensor, start: int) -> Tensor:
    end = start + AT_ONCE
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.view(-1)[start:end]
    kept: Any = tensor
    scale = kept.scale[start // kept.block_size : end // kept.block_size]
    return type(kept)(kept.codes.view(-1)[start:end], scale, kept.qmap, kept.signed, kept.dtype)


def _update_part(
    p: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    root: float,
    rate: float,
    keep: float,
) -> None:
    """Moments start at 0, which is corrected: `rate` is the learning rate with the first moment's correction, and
    `root` the square root of the second's. `keep`: what weight decay leaves of a parameter."""
    mean = whole(exp_avg).lerp(grad, 1 - betas[0])
    exp_avg.copy_(mean)
    square = whole(exp_avg_sq).lerp(grad.square(), 1 - betas[1])
    exp_avg_sq.copy_(square)
    p.mul_(keep)
    p.addcdiv_(mean, square.sqrt_().div_(root).add_(eps), value=-rate)
