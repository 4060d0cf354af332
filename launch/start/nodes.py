"""torchrun's arguments for a run on several hosts, which meet at a store on the first of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from train.command.resources import path_of


@dataclass(frozen=True)
class Node:
    """One of several hosts whose ranks are one world. `number`: from 0 on; ranks are numbered from host to host.
    `head`, `port`: where host 0 has torchrun's store. `address`, `interface`: at which the others reach this host;
    empty if torch is to find them. `join_s`: how long torchrun waits for the others."""

    number: int
    count: int
    head: str
    port: int
    address: str = ""
    join_s: int = 60
    interface: str = ""

    @property
    def environment(self) -> dict[str, str]:
        own = {"GLOO_SOCKET_IFNAME": self.interface} if self.interface else {}
        return own | {"PET_RDZV_CONF": f"timeout={self.join_s}"}


def nodes_line(
    overrides: Sequence[str], nproc_per_node: int, node: Node, *, program: str = "train/main.py"
) -> list[str]:
    """torchrun's arguments on one of the hosts. `program`: of this source tree, which every rank runs."""
    where = [f"--nnodes={node.count}", f"--node_rank={node.number}"]
    where += [f"--master_addr={node.head}", f"--master_port={node.port}"]
    where += [f"--local_addr={node.address}"] if node.address else []
    return [*where, f"--nproc_per_node={nproc_per_node}", path_of(program), *overrides]
