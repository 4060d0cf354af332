"""torchrun's arguments for a run on several hosts, which meet at a store on the first of them (its c10d rendezvous)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from train.command.resources import path_of


@dataclass(frozen=True)
class Meeting:
    """How `nodes` hosts find each other: at `host`:`port`, which is on the first of them, within `join_s` seconds.
    `name`: the same text on all of them, and another one for each run."""

    nodes: int
    host: str
    port: int
    name: str
    join_s: int


def nodes_line(
    overrides: Sequence[str],
    nproc_per_node: int,
    meeting: Meeting,
    *,
    first: bool,
    address: str | None = None,
    program: str = "train/main.py",
) -> list[str]:
    """torchrun's arguments on one of the hosts. `first`: whether this one has the store; torchrun would otherwise look
    up names to find out. `address`: of this host; ranks are numbered in the order of these texts. `program`: of this
    source tree, which every rank runs."""
    join_s = meeting.join_s
    conf = {"is_host": str(first).lower(), "join_timeout": join_s, "read_timeout": join_s, "last_call_timeout": 1}
    return [
        f"--nnodes={meeting.nodes}",
        f"--nproc_per_node={nproc_per_node}",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint={meeting.host}:{meeting.port}",
        f"--rdzv_id={meeting.name}",
        f"--rdzv_conf={','.join(f'{name}={value}' for name, value in conf.items())}",
        *([f"--local_addr={address}"] if address else []),
        path_of(program),
        *overrides,
    ]
