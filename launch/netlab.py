"""Train on an emulated cluster: python -m launch.netlab nodes=2 nproc=4 inter=25mbit,100mbit strategy=dp,fsdp,tp,pp

Each host is a network namespace of this machine, with one torchrun agent and real gloo traffic over links that are
shaped to the given rates. Takes every override that train/main.py takes, with several values as launch.sweep does, and
the options that --help shows. The links are measured first, then every run is predicted, then run at each speed, and at
the end the prediction, the measurement and the bytes of each link stand side by side. If something happens to a host
(fault=…), nothing is measured or predicted, as times say nothing then.

It needs Linux, and root or user namespaces. Everything it makes ends with it; what a killed one has left is ended by
the next start, and by launch.doctor. The same line continues what was interrupted. The exit code is that of the first
run that failed, 2 for a wrong command line, and 3 if this machine cannot emulate what was asked.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator

from launch.emulating import jobs
from launch.emulating.agents import Job, environment, lines_of, nodes_of
from launch.emulating.lab import Lab
from launch.emulating.namespaces import Rights, Steps, has_netem, network, refuse, rights
from launch.emulating.record import clean_up, recorded
from launch.emulating.task import Task, read, speed_name
from launch.start.alive import sweep_lock
from train.command.process.exits import reported_once
from train.command.process.streams import lasting
from train.command.resources import path_of
from train.config.world import World

BRIDGE_PID = "PID"  # in what dry_run prints
NETEM = "netem, which delays and loses packets, is not in this kernel"
NETEM_FIX = "use a kernel with CONFIG_NET_SCH_NETEM (modprobe sch_netem), or leave delay and loss out"


def main(argv: list[str]) -> int:
    with reported_once(World.single()):
        task = read(argv, __doc__ or "")
        if task.dry_run:
            print("\n".join(dry_lines(task)))
            return 0
        found = rights()
        for line in clean_up():
            print(line, file=sys.stderr, flush=True)
        if (task.cluster.delay_ms or task.cluster.loss_pct) and not has_netem(found):
            raise refuse("netem", NETEM, NETEM_FIX)
        with sweep_lock(task.folder), recorded() as record, network(task.cluster, found, record) as net:
            lab = Lab(task, net, record.mark)
            if not task.disturbed:
                lab.measure()
            if not (task.links or task.disturbed):
                lab.predict(lab.computation())
            code = 0 if task.links else lab.run_all()
    return code if task.disturbed else finish(task, code)


def comparison(task: Task) -> list[str]:
    """The words of the comparison after `python`, with pictures where they can be drawn."""
    line = [path_of("scripts/compare.py"), str(task.folder)]
    if importlib.util.find_spec("matplotlib") is not None:
        line += ["--html", str(task.folder / "report.html")]
        line += [] if task.links else ["--png", str(task.folder)]
    return line


def finish(task: Task, code: int) -> int:
    """Show the comparison, and return the exit code."""
    line = comparison(task)
    print(shlex.join(["python", *line]), flush=True)
    shown = subprocess.run([sys.executable, *line], check=False)
    return code or shown.returncode


def dry_lines(task: Task) -> Iterator[str]:
    """Every command that a first start would run, in order; PID0 stands for the id of the process that holds host 0."""
    way, cluster = Rights(rootless=os.geteuid() != 0), task.cluster
    names = [f"PID{node}" for node in range(cluster.nodes)]

    def inside(steps: Steps) -> Iterator[str]:
        for node, lines in steps:
            enter = way.enter(BRIDGE_PID if node < 0 else names[node])
            yield from (shlex.join([*enter, "sh", "-c", line.format(*names)]) for line in lines)

    def torchrun(what: str, job: Job) -> Iterator[str]:
        yield f"# {what}"
        for agent, line in lines_of(job, cluster):
            yield shlex.join([*way.enter(names[agent.node]), "torchrun", *line])

    yield "# the namespaces of the bridge and of the hosts, each held by a process that ends with launch.netlab"
    yield shlex.join([*way.unshare, "cat"])
    yield from (shlex.join([*way.enter(BRIDGE_PID), "unshare", "--net", "cat"]) for _ in names)
    yield from inside(cluster.makes())
    (first, *_) = nodes_of(jobs.messages(task, *jobs.unshaped_of(task)), cluster)
    env = environment(first, cluster.nproc, "")
    told = " ".join(f"{name}={env[name]}" for name in ("GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS", "PET_RDZV_CONF"))
    yield f"# torchrun has {told} in its environment"
    if task.preset:
        yield f"# preset={task.preset.name}: rates follow from the measured speed of this machine; here, none is shaped"
    if not task.disturbed:
        yield from torchrun("messages without shapers", jobs.messages(task, *jobs.unshaped_of(task)))
        for speed in task.speeds:
            yield from inside(cluster.shapes(speed))
            yield from torchrun(f"messages, {speed_name(speed)}", jobs.messages(task, *jobs.links_of(task, speed)))
    if not (task.links or task.disturbed):
        yield from torchrun("the computation", jobs.computation(task))
    for speed in () if task.links else task.speeds:
        yield from inside(cluster.shapes(speed))
        for point in task.points:
            fault = f", fault={task.fault}" if task.fault else ""
            yield from torchrun(f"{speed_name(speed)} {point.label}{fault}", jobs.training(task, point, speed))
    if not task.disturbed:
        yield "# the comparison"
        yield shlex.join(["python", *comparison(task)])


if __name__ == "__main__":
    lasting()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # the ranks end in order
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
