"""The dtype in which norms, RoPE, routers and losses are computed."""

from __future__ import annotations

import torch
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """x in the larger of float32 and its own dtype."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
