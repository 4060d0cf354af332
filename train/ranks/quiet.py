"""Messages of optional packages that say nothing about a run."""

from __future__ import annotations

import logging

_TORCHAO = ("torchao", "torch.utils._pytree")


def quiet_torchao(*more: str) -> None:
    """Call it before torchao is imported: torchao 0.18 says that it has kernels of other devices too. `more`: other
    packages whose warnings are hidden too."""
    for name in (*_TORCHAO, *more):
        logging.getLogger(name).setLevel(logging.ERROR)
