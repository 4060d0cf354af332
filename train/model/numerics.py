"""Dtypes that computations share."""

from __future__ import annotations

import torch
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """To the larger of float32 and x's dtype, for norms, RoPE, routers and losses."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
