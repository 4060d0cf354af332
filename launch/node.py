"""Start one machine's part of a run on several: python -m launch.node nodes=2 node=0 head=10.0.0.1:29500 strategy=dp

Type the same line on every machine, each with its own node=NUMBER, within join_s seconds. The machines first compare
what they would run, at the address of machine 0. If one is missing, or has another config or other versions, every
machine says so, with the names of those who have joined, and nothing is started. Otherwise each prints its torchrun
line and runs it. nproc is the number of processes of all machines together; without it, each machine runs one.

Takes every override that train/main.py takes, and the options that --help shows. The exit code is 2 or 3 if nothing was
started, else that of this machine's ranks.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import shlex
import socket
import sys
from importlib.metadata import version
from typing import Any

import psutil
from omegaconf import DictConfig, OmegaConf

from launch.cluster.roll_call import roll_call
from launch.cluster.size import popped_size
from launch.describe.memory import check_memory
from launch.describe.nodes import warnings
from launch.local import check_machine, check_text, make_folder
from launch.start.device import laid_out
from launch.start.environment import local_environment
from launch.start.foreground import run_here
from launch.start.nodes import Node, nodes_line
from train.command import as_typed, cli, options
from train.command.launching import nodes
from train.command.process.exits import leave_on_interrupt, reported_once
from train.command.process.streams import lasting
from train.command.resources import source_commit
from train.config.plan import Plan
from train.config.problems import BadInput, Problem
from train.config.world import LAUNCH, World
from train.record.run_folder import flat


def main() -> None:
    leave_on_interrupt()
    with reported_once(World.single()):
        argv = sys.argv[1:]
        node, force, logs = read(argv), options.FORCE.pop(argv), nodes.LOGS.pop(argv)
        dry_run, size = nodes.DRY_RUN.pop(argv), popped_size(argv, node.count)
        parser = cli.parser(nodes.ON_NODE, __doc__ or "")
        config, tree, _ = cli.parse(parser, laid_out(argv, size.nproc, kept=1)[0])
        cli.check(config, size.nproc)
        for warning in warnings(Plan(config, size.nproc), size.nodes):
            print(warning, file=sys.stderr, flush=True)
        overrides = parser.parse_intermixed_args(argv).overrides
        if dry_run:
            print(shlex.join(["torchrun", *nodes_line(overrides, size.per_node, connected(node))]), flush=True)
            return
        check_text(config, size.nproc)
        check_machine(config, size.per_node, None)
        if not force:
            check_memory(config, size.nproc, size.nodes)
        make_folder(config.metrics.dir)
        launch = roll_call(node, facts(tree, size.nodes, size.nproc))
    node = connected(node)
    env, notes = local_environment(size.per_node, os.environ, node)
    print("".join(f"{note}\n" for note in notes), end="", file=sys.stderr, flush=True)
    line = nodes_line(overrides, size.per_node, node)
    print(shlex.join(["torchrun", *line]), flush=True)
    sys.exit(run_here(line, env | {LAUNCH: launch}, timeout_s=config.runtime.timeout_s, logs=logs))


def read(argv: list[str]) -> Node:
    """Which machine this is. Raises BadInput."""
    count, number, head = nodes.NODES.pop(argv), nodes.NODE.pop(argv), nodes.HEAD.pop(argv)
    join_s = nodes.JOIN_S.pop(argv)
    if number >= count:
        fix = f"use node=0 to node={count - 1}, or another nodes=N"
        raise BadInput(Problem("node", f"node={number} with nodes={count}, but machines count from 0", fix))
    if head is None:
        if count > 1:
            message = f"nodes={count} without head: the machines cannot find each other"
            fix = "use head=HOST:PORT, an address of machine 0 and a free port there"
            raise BadInput(Problem("head", message, fix))
        head = ("127.0.0.1", free_port())
    return Node(number, count, *head, join_s=join_s)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def connected(node: Node) -> Node:
    """The node with the address and the interface at which the others reach it: those from which it reaches the head.
    Both stay empty if there are none."""
    try:
        family, _, _, _, target = socket.getaddrinfo(node.head, node.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # of a datagram: nothing is sent
            address = str(probe.getsockname()[0])
    except OSError:
        return node
    names = [
        name for name, ones in psutil.net_if_addrs().items() if any(_plain(one.address) == address for one in ones)
    ]
    return dataclasses.replace(node, address=address, interface=names[0] if names else "")


def _plain(address: str) -> str:
    return address.partition("%")[0]  # an IPv6 address of a link is followed by the interface


def facts(tree: DictConfig, count: int, nproc: int) -> dict[str, Any]:
    """What must be equal on all machines, by key. A value from the environment may be private: its hash is compared."""
    values = OmegaConf.to_container(tree, resolve=True, enum_to_str=True)
    for typed in as_typed.from_environment(tree):
        as_typed.put(values, typed.path, typed.digest)
    own: dict[str, Any] = flat(values)
    own |= {"nodes": count, "nproc": nproc, "python": platform.python_version(), "torch": version("torch")}
    return own | {"the source's commit": source_commit()}


if __name__ == "__main__":
    lasting()
    main()
