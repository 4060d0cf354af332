"""How far a number or a tensor of the lab may be from the one that it is held against."""

from __future__ import annotations

import torch
from torch import Tensor


class Differs(AssertionError):
    """The lab and its anchor do not agree. Only this error shows that a check saw a bug."""


def hold(name: str, ours: Tensor | float, theirs: Tensor | float, bound: float) -> float:
    """The error max|a-b| / max|b|, as in the proof. Raises Differs if it is above `bound`, or not a number."""
    a, b = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (ours, theirs))
    if a.shape != b.shape:
        raise Differs(f"{name}: its shape is {tuple(a.shape)}, and {tuple(b.shape)} in the anchor")
    distance, size = (a - b).abs().max().item(), b.abs().max().item()
    error = distance / size if size else distance
    if not error <= bound:
        raise Differs(f"{name}: it is {error:.1e} from the anchor, and the bound is {bound:.0e}")
    return error
