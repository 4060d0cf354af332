"""How many machines and processes a run has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from train.command import options
from train.config.problems import BadInput, Problem


@dataclass(frozen=True)
class Size:
    """`nproc`: the number of processes of all `nodes` together. Raises BadInput if the nodes cannot share them
    equally."""

    nodes: int
    nproc: int

    def __post_init__(self) -> None:
        if self.nproc % self.nodes:
            near = max(self.nproc // self.nodes, 1) * self.nodes
            message = f"nproc={self.nproc} is not divisible by nodes={self.nodes}, but all nodes run equally many"
            raise BadInput(Problem("nodes", message, f"use nproc={near}, for example"))

    @property
    def per_node(self) -> int:
        return self.nproc // self.nodes


def popped_size(argv: list[str], nodes: int, per_node: int = 1) -> Size:
    """Remove nproc from a command line. Without it, every node runs `per_node` processes."""
    given = has_nproc(argv)
    nproc = options.NPROC.pop(argv)
    return Size(nodes, nproc if given else nodes * per_node)


def has_nproc(argv: Sequence[str]) -> bool:
    return any(word.startswith("nproc=") for word in argv)
