"""Messages of optional packages that say nothing about a run."""

from __future__ import annotations

import logging


def quiet_torchao() -> None:
    """Call it before torchao is imported: torchao 0.18 says that it has kernels of other devices too."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
