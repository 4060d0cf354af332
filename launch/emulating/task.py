"""The command line of launch.netlab, read and checked before a process is started."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.cluster.size import Size, popped_size
from launch.emulating.cluster import Cluster
from launch.emulating.placement import full_order, hosts_of_ranks
from launch.emulating.presets import Preset, preset_named
from launch.sweeping.grid import Checked, InvalidPoints, check_all, expand
from launch.sweeping.starting import saving
from train.command import cli, options
from train.command.launching import netlab
from train.command.launching.network import Fault, Order, shown_rate
from train.command.launching.nodes import DRY_RUN, JOIN_S, NETLAB, NODES
from train.command.overrides import with_quotes
from train.config.plan import Plan
from train.config.problems import BadInput, Problem

USUAL_NODES = 2
MOST_HOSTS, MOST_RANKS = 64, 128  # processes of torchrun and of ranks have at least 0.2 GiB each
UNSHAPED = "unshaped"
DEVICE = "runtime.device="
PLAIN = re.compile(r"[\w./-]+", re.ASCII)  # a path that needs no quotes


@dataclass(frozen=True)
class Point:
    """A run at each speed. `overrides`: without the folder of its runs. `order`: of its axes, from inside a host
    outward. `hosts`: of its ranks."""

    label: str
    overrides: tuple[str, ...]
    plan: Plan
    order: Order
    hosts: tuple[int, ...]


@dataclass(frozen=True)
class Task:
    """`speeds`: rates of the hosts' links in bit/s; None for unshaped. `line`: as typed."""

    cluster: Cluster
    points: tuple[Point, ...]
    speeds: tuple[float | None, ...]
    preset: Preset | None
    fault: Fault | None
    join_s: int
    links: bool
    fresh: bool
    dry_run: bool
    folder: Path
    line: tuple[str, ...]

    @property
    def disturbed(self) -> bool:
        """Whether something happens to a host, so that times say nothing. Links that are slow in one direction are
        none of this."""
        return self.fault is not None and self.fault.kind != "slow"

    def folder_of(self, speed: float | None) -> Path:
        """The folder of the runs at this speed."""
        return self.folder / speed_name(speed)

    def words(self, point: Point, speed: float | None) -> tuple[str, ...]:
        """The overrides of a run."""
        folder = str(self.folder_of(speed))
        return (*point.overrides, f"metrics.dir={folder if PLAIN.fullmatch(folder) else with_quotes(folder)}")


def speed_name(speed: float | None) -> str:
    return UNSHAPED if speed is None else shown_rate(speed)


def read(argv: Sequence[str], description: str) -> Task:
    """Raises BadInput, with all problems of the runs, and exits after --help."""
    line, argv = tuple(argv), [*argv]
    given = any(word.startswith(f"{NODES.name}=") for word in argv)
    nodes = NODES.pop(argv)
    size = popped_size(argv, nodes if given else USUAL_NODES)
    inter, intra = netlab.INTER.pop(argv), netlab.INTRA.pop(argv)
    delay, loss = netlab.DELAY.pop(argv), netlab.LOSS.pop(argv)
    orders, preset, fault = netlab.ORDER.pop(argv), netlab.PRESET.pop(argv), netlab.FAULT.pop(argv)
    join_s, links, dry_run = JOIN_S.pop(argv), netlab.LINKS.pop(argv), DRY_RUN.pop(argv)
    fresh, force = options.FRESH.pop(argv), options.FORCE.pop(argv)
    parser = cli.parser(NETLAB, description)
    args = parser.parse_intermixed_args(argv)
    found = expand(args.overrides)
    if args.help:
        cli.show_help(parser, [point.overrides for point in found])
    if args.cfg:
        raise BadInput(Problem("cfg", "--cfg prints one config, but here are several", "use launch.local --cfg job"))
    _check(size, preset, inter, intra, fault)
    for word in argv:
        if word.startswith(DEVICE) and word not in (f"{DEVICE}auto", f"{DEVICE}cpu"):
            message = f"{word}, but the hosts of an emulated cluster share the CPU"
            raise BadInput(Problem("netlab_device", message, f"leave {word} out"))
    words = [*args.overrides, f"nproc={size.nproc}"]
    slow = ((fault.node, fault.rate),) if fault and fault.kind == "slow" and fault.rate else ()
    cluster = Cluster(size.nodes, size.nproc, intra, delay, loss, slow)
    checked = check_all(parser, expand(words), "global", force=force)
    if any(one.problems for one in checked):
        raise InvalidPoints(checked, "global")
    points = [point for one in checked for point in _points(one, orders, size.nodes)]
    return Task(
        cluster,
        tuple(points),
        inter or (None,),
        preset_named(preset) if preset else None,
        fault,
        join_s,
        links,
        fresh,
        dry_run,
        _folder(points, cluster),
        line,
    )


def _check(size: Size, preset: str | None, speeds: object, intra: float | None, fault: Fault | None) -> None:
    problems = []
    if size.nodes > MOST_HOSTS or size.nproc > MOST_RANKS:
        message = f"nodes={size.nodes} and nproc={size.nproc} are more than one machine can emulate"
        problems.append(Problem("nodes", message, f"use at most nodes={MOST_HOSTS} and nproc={MOST_RANKS}"))
    if preset and (speeds or intra):
        message = f"preset={preset} sets inter and intra, but one of them is given too"
        problems.append(Problem("preset", message, "leave one of them out"))
    if preset and fault:
        message = f"preset={preset} needs a measurement, which fault={fault} would disturb"
        problems.append(Problem("preset", message, "give inter and intra, or leave one of them out"))
    if fault and fault.node >= size.nodes:
        message = f"fault={fault} names host {fault.node}, but the hosts are 0 to {size.nodes - 1}"
        problems.append(Problem("fault", message, f"use one of them, or nodes={fault.node + 1}"))
    if problems:
        raise BadInput(*problems)


def _points(one: Checked, orders: Sequence[Order] | None, nodes: int) -> list[Point]:
    assert one.plan is not None
    kept = [word for word in one.point.overrides if not word.startswith(("metrics.dir=", DEVICE))]
    overrides = (*kept, *saving(kept), f"{DEVICE}cpu")
    found = []
    for given in orders or (None,):
        order = full_order(given, one.plan.degrees)
        label = one.point.label if given is None else f"{one.point.label} order={'.'.join(order)}"
        hosts = hosts_of_ranks(one.plan.degrees, order, nodes)
        found.append(Point(label, overrides, one.plan, order, tuple(hosts)))
    return found


def _folder(points: Sequence[Point], cluster: Cluster) -> Path:
    """The same for the same runs on the same hosts, at whatever speeds and with whatever faults."""
    told = [[*point.overrides, *map(str, point.hosts)] for point in points]
    links = [cluster.nodes, cluster.intra, cluster.delay_ms, cluster.loss_pct]
    digest = hashlib.sha256(json.dumps([sorted(told), links]).encode()).hexdigest()[:6]
    return Path(points[0].plan.config.metrics.dir) / f"netlab-{digest}"
