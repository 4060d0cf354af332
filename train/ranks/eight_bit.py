"""AdamW whose moments are kept in 8 bits, in blocks of 256 neighbouring elements (Dettmers et al. 2022), by torchao.

The state and its codes are torchao's. Its own step compiles a graph for every shape of a parameter, in every process;
this one computes the same formula without a compiler, in the parameter's own type. Both use private parts of torchao
(0.18).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchao.optim import AdamW8bit

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
        mean = whole(state["exp_avg"]).lerp(grad, 1 - beta1)
        square = whole(state["exp_avg_sq"]).lerp(grad.square(), 1 - beta2)
        state["exp_avg"].copy_(mean)
        state["exp_avg_sq"].copy_(square)
        count = float(state["step"])
        divisor = square.sqrt().div_((1 - beta2**count) ** 0.5).add_(group["eps"])
        p.mul_(1 - lr * group["weight_decay"])
        p.addcdiv_(mean, divisor, value=-lr / (1 - beta1**count))
