"""Records the dropout masks that a rank draws in training: the kept elements, the scale, and the backward's mask."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass
class Mask:
    """`kept` [B, T, D]. `exact`: the output equals input x kept / (1 - p). `replayed`: the gradient also uses the same
    mask; None if there was no backward, as for masks that recomputation draws again."""

    place: str
    kept: Tensor
    exact: bool
    replayed: bool | None = None


@dataclass
class Watch:
    """Records the masks of a model's dropout modules, in the order in which they are drawn."""

    masks: list[Mask] = field(default_factory=list)
    changed_in_evaluation: int = 0
    evaluated: int = 0

    def __call__(self, model: nn.Module) -> Watch:
        for name, module in model.named_modules():
            if isinstance(module, nn.Dropout):
                module.register_forward_hook(partial(self._note, name))
        return self

    def _note(self, name: str, module: nn.Dropout, args: tuple[Tensor], out: Tensor) -> None:
        (x,) = args
        if not module.training:
            self.evaluated += 1
            self.changed_in_evaluation += not torch.equal(x, out)
            return
        assert x.ne(0).all(), "a mask is read off the zeros of what came out"
        kept = out.detach() != 0
        factor = kept / (1 - module.p)
        mask = Mask(name, kept, torch.allclose(out.detach(), x.detach() * factor, rtol=1e-12, atol=0))
        arrived: list[Tensor] = []

        def compare(grad: Tensor) -> None:
            mask.replayed = torch.allclose(grad, arrived[0] * factor, rtol=1e-12, atol=0)

        out.register_hook(arrived.append)
        x.register_hook(compare)
        self.masks.append(mask)

    def take(self) -> tuple[list[Mask], int]:
        """The masks of training since the last call, and the number of masks that recomputation drew again."""
        masks, self.masks = self.masks, []
        trained = [mask for mask in masks if mask.replayed is not None]
        return trained, len(masks) - len(trained)


@dataclass
class Drawn:
    """The masks of one rank, to be compared on rank 0. `steps`: the masks of each step, [number of masks, elements]."""

    place: dict[str, int]
    steps: list[np.ndarray]
    calls: list[str]  # the dropout of each mask of a step
    recomputed: int
    exact: bool
    replayed: bool
    evaluated: int
    changed_in_evaluation: int


def agreement(a: np.ndarray, b: np.ndarray, p: float) -> float:
    """The agreement of two sets of masks, in standard deviations above that of independent masks."""
    share = p * p + (1 - p) ** 2
    return float((np.mean(a == b) - share) / np.sqrt(share * (1 - share) / a.size))


def surplus(masks: np.ndarray, p: float) -> float:
    """The number of standard deviations by which the kept fraction is above 1 - p."""
    return float((masks.mean() - (1 - p)) / np.sqrt(p * (1 - p) / masks.size))


def neighbours(drawn: Drawn) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of masks that must be independent: those of consecutive microbatches, and of consecutive steps."""
    for step in drawn.steps:
        of_place = [step[[i for i, name in enumerate(drawn.calls) if name == place]] for place in set(drawn.calls)]
        for lag in (1, 2):  # a block's dropout is called twice a microbatch
            pairs = [(calls[:-lag], calls[lag:]) for calls in of_place]
            yield np.concatenate([a for a, _ in pairs]), np.concatenate([b for _, b in pairs])
    yield from zip(drawn.steps[:-1], drawn.steps[1:], strict=True)


def facts(ranks: list[Drawn], p: float) -> dict[str, Any]:
    """The values about which a test makes assertions. For each pair of ranks "i j": the fraction of masks that are
    bitwise equal, compared in the order in which they were drawn, and the agreement of all masks."""
    everything = [np.concatenate(drawn.steps) for drawn in ranks]
    equal, agree = {}, {}
    for i, a in enumerate(everything):
        for j, b in list(enumerate(everything))[i + 1 :]:
            n = min(len(a), len(b))  # a stage without the embedding draws fewer
            equal[f"{i} {j}"] = float((a[:n] == b[:n]).all(axis=1).mean())
            agree[f"{i} {j}"] = agreement(a[:n], b[:n], p)
    return {
        "places": [drawn.place for drawn in ranks],
        "elements": [masks.size for masks in everything],
        "surplus": [surplus(masks, p) for masks in everything],
        "largest_surplus_of_one": max(abs(surplus(mask, p)) for masks in everything for mask in masks),
        "repeated": sum(len(masks) - len(np.unique(masks, axis=0)) for masks in everything),
        "agreement_over_time": [agreement(a, b, p) for drawn in ranks for a, b in neighbours(drawn)],
        "equal": equal,
        "agreement": agree,
        "recomputed": min(drawn.recomputed for drawn in ranks),
        "exact": all(drawn.exact for drawn in ranks),
        "replayed": all(drawn.replayed for drawn in ranks),
        "evaluated": min(drawn.evaluated for drawn in ranks),
        "changed_in_evaluation": sum(drawn.changed_in_evaluation for drawn in ranks),
    }
