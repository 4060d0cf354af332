"""What the runtimes have in common that take and give torch's tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from scripts.exporting.running.slots import Graph


def graph_of(run: Callable[..., Sequence[Tensor]]) -> Graph:
    """The function of tensors as one of arrays, which have the same memory."""

    def graph(*inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        with torch.no_grad():
            logits, keys, values = run(*(torch.from_numpy(one) for one in inputs))
        return logits.numpy(), keys.numpy(), values.numpy()

    return graph
