"""What launch.netlab does on an emulated cluster that exists: measures its links, predicts, runs, and writes it down.

<folder>/unshaped.json         messages without shapers
<folder>/computation.yaml      the profile of the computation, with all processes at work
<folder>/<speed>/links.json    messages on the shaped links
<folder>/netlab.json           the cluster, and for each run its prediction, its folder, and the bytes of each link
<folder>/<speed>/points/       a log for each host, and the state of the runs
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.emulating import jobs
from launch.emulating.agents import Job, Outcome, run
from launch.emulating.cluster import PAYLOAD, RESULTS
from launch.emulating.namespaces import Network, refuse
from launch.emulating.predicting import Measured, prediction
from launch.emulating.rows import ahead, row_of, said
from launch.emulating.task import Point, Task, speed_name
from launch.start.torchrun import last_words
from launch.sweeping.points import Entry, State
from train.command.launching.network import shown_rate
from train.command.planning.hardware import load
from train.command.planning.profile import lacking
from train.config import plain_json
from train.config.groups.hardware import HardwareConfig
from train.config.problems import EXIT_STOPPED, Reported
from train.record.run_files import read_json, write_whole
from train.record.run_folder import DONE, FAILED, RUNNING


class NotMeasured(Reported):
    """A measurement that everything else needs has failed."""

    exit_code = EXIT_STOPPED


@dataclass
class Lab:
    """`net`: the cluster. `mark`: of its record. `speeds`: as asked, or as the preset gives them."""

    task: Task
    net: Network
    mark: str
    unshaped: Measured = field(default_factory=lambda: Measured({}))
    links: dict[float | None, Measured] = field(default_factory=dict)
    speeds: tuple[float | None, ...] = ()
    rows: list[dict[str, Any]] = field(default_factory=list)
    before: dict[str, Any] = field(default_factory=dict)  # what an earlier start has written

    def __post_init__(self) -> None:
        path = self.task.folder / RESULTS
        self.before = {} if self.task.fresh else read_json(path) or {}

    def measure(self) -> None:
        """Messages without shapers, then on the links of every speed. Raises BadInput for a speed that is not
        reached."""
        task = self.task
        print(f"hosts: {task.cluster.nodes}, processes: {task.cluster.nproc}; measuring the links", flush=True)
        self.unshaped = self._messages(*jobs.unshaped_of(task))
        self.speeds = task.speeds if task.preset is None else self._scaled()
        check_speeds(self.unshaped, task, self.speeds)
        for speed in self.speeds:
            self.links[speed] = self.unshaped
            if speed is not None or self.net.cluster.intra is not None:
                self.shape(speed)
                self.links[speed] = self._messages(*jobs.links_of(task, speed))
        self._save()

    def shape(self, speed: float | None) -> None:
        self.net.do(self.net.cluster.unshapes())
        self.net.do(self.net.cluster.shapes(speed))

    def predict(self, hardware: HardwareConfig) -> None:
        """The prediction of every run, written before the first of them starts. A run that is done keeps its own."""
        known = {(row["label"], row["inter"]): row for row in self.before.get("rows", [])}
        for speed in self.speeds:
            for point in self.task.points:
                row = known.get((point.label, speed), {})
                if row.get("status") == DONE:
                    self.rows.append(row)
                    continue
                found = prediction(
                    point.plan,
                    hardware,
                    point.hosts,
                    math.inf if speed is None else speed,
                    self.net.cluster.intra,
                    self.links[speed],
                    self.unshaped,
                )
                self.rows.append(row_of(point, speed, found))
        self._save()
        print(ahead(self.rows, self.task.points), flush=True)

    def run_all(self) -> int:
        """Run every point at every speed that has not been run before; return the exit code of the first that
        failed."""
        code = 0
        for speed in self.speeds or self.task.speeds:
            self.shape(speed)
            state = self._state(speed)
            for entry, point in zip(state.entries, self.task.points, strict=True):
                row = next((r for r in self.rows if (r["label"], r["inter"]) == (point.label, speed)), {})
                if entry.status != DONE:
                    outcome = self._run(state, entry, point, speed)
                    row |= {"exit_code": outcome.exit_code, "sent": outcome.sent, "seconds": outcome.seconds}
                    code = code or outcome.exit_code
                row |= {"status": entry.status, "run_dir": entry.run_dir}
                print(f"{speed_name(speed)} {point.label}: {said(row, entry)}", flush=True)
                if self.rows:
                    self._save()
        return code

    def computation(self) -> HardwareConfig:
        """The profile of the computation: that of `hardware=`, or measured here with all processes at once."""
        plan = self.task.points[0].plan
        given = plan.config.hardware
        if given.measured:
            return given
        path = self.task.folder / f"{jobs.COMPUTATION}.yaml"
        if self.task.fresh or not path.exists():
            print(f"measuring the computation, for about {jobs.COMPUTING_S} s", flush=True)
            self._measured(jobs.computation(self.task), self.task.folder / jobs.COMPUTATION)
        found = load(path)
        if missing := lacking(found, plan.config.precision.value):
            fix = "end other programs and use fresh=true, or give a profile by hardware=measured/NAME"
            raise NotMeasured(f"{path} has no {', '.join(missing)}, as the time for it was too short: {fix}")
        return found

    def _scaled(self) -> tuple[float | None, ...]:
        preset, cluster = self.task.preset, self.net.cluster
        assert preset is not None
        rates = self.computation().matmul_tflops
        precision = self.task.points[0].plan.config.precision.value
        inter, intra = (float(f"{rate:.3g}") for rate in preset.scaled(rates[precision], cluster.per_node))
        reached = self.unshaped.rate("all_reduce", cluster.nproc) or math.inf
        kept = intra if cluster.per_node > 1 and intra < reached / PAYLOAD else None
        self.net.cluster = dataclasses.replace(cluster, intra=kept)
        inside = shown_rate(kept) if kept else "unshaped, as this machine is not faster"
        print(f"preset {preset.name}: inter={shown_rate(inter)}, inside a host {inside}", flush=True)
        return (inter,)

    def _messages(self, file: Path, sizes: Sequence[int]) -> Measured:
        self._measured(jobs.messages(self.task, file, sizes), file.with_suffix(""))
        found = read_json(file) or {}
        if found["left_out"]:
            raise NotMeasured(f"{file}: there was no time for {', '.join(found['left_out'])}: end other programs")
        return Measured.of(found["rows"])

    def _measured(self, job: Job, logs: Path) -> None:
        """Run a program on all hosts. Raises NotMeasured with its last words if it fails."""
        logs.mkdir(parents=True, exist_ok=True)
        outcome = run(job, self.net, self.mark, logs, logs / "run")
        if outcome.first is not None:
            said = "\n".join(f"    {line}" for line in last_words(logs / f"{outcome.first}.log"))
            raise NotMeasured(f"{job.program} failed with exit code {outcome.exit_code}:\n{said}")

    def _state(self, speed: float | None) -> State:
        task = self.task
        folder = task.folder_of(speed) / "points"
        entries = [Entry(p.label, [*p.overrides], p.plan.world_size, f"{i}.log") for i, p in enumerate(task.points)]
        state = State(folder, "global", "", entries)
        folder.mkdir(parents=True, exist_ok=True)
        state.forget() if task.fresh else state.resume()
        return state

    def _run(self, state: State, entry: Entry, point: Point, speed: float | None) -> Outcome:
        task = self.task
        print(f"{speed_name(speed)} {point.label} ...", flush=True)
        entry.discard(state.folder, but_saved=True)
        entry.status, entry.run_dir, entry.exit_code = RUNNING, None, None
        (state.folder / entry.run_file).unlink(missing_ok=True)
        state.save()
        logs = state.folder / Path(entry.log).stem
        logs.mkdir(exist_ok=True)
        job = jobs.training(task, point, speed)
        outcome = run(job, self.net, self.mark, logs, state.folder / entry.run_file)
        entry.exit_code, entry.seconds = outcome.exit_code, outcome.seconds
        entry.settle(state.folder)
        if entry.status != DONE:
            entry.status = FAILED
        state.save()
        if outcome.first is not None:
            node = job.agents[outcome.first].node
            print(f"host {node} failed first, exit code {outcome.exit_code}; its last lines:", flush=True)
            print("\n".join(f"    {line}" for line in last_words(logs / f"{outcome.first}.log")), flush=True)
        return outcome

    def _save(self) -> None:
        """Write it down, with what an earlier start found at other speeds."""
        task, cluster = self.task, self.net.cluster
        speeds = {*self.speeds}
        rows = [row for row in self.before.get("rows", []) if row["inter"] not in speeds]
        links = [row for row in self.before.get("links", []) if row[0] not in speeds]
        values = {
            "line": [*task.line],
            "cluster": dataclasses.asdict(cluster),
            "unshaped_mbit": (self.unshaped.rate("all_reduce", cluster.nproc) or 0.0) / PAYLOAD / 1e6,
            "preset": None if task.preset is None else dataclasses.asdict(task.preset),
            "links": links + [[speed, *row] for speed, found in self.links.items() for row in found.rows_again()],
            "rows": rows + self.rows,
        }
        write_whole(task.folder / RESULTS, plain_json.dumps(values, indent=2) + "\n")


def check_speeds(unshaped: Measured, task: Task, speeds: Sequence[float | None]) -> None:
    """Raise BadInput (exit code 3) for a speed that the links do not reach without a shaper."""
    cluster = task.cluster
    for name, asked, ranks in (
        ("inter", max((speed for speed in speeds if speed), default=None), cluster.nproc),
        ("intra", cluster.intra, cluster.per_node if cluster.per_node > 1 else cluster.nproc),
    ):
        payload = unshaped.rate("all_reduce", ranks) or unshaped.rate("all_reduce", cluster.nproc)
        if asked and payload and asked * PAYLOAD > payload:
            reached = shown_rate(float(f"{payload / PAYLOAD:.3g}"))
            message = f"{name}={shown_rate(asked)} is faster than this machine itself, which reaches {reached} unshaped"
            raise refuse("netlab_speed", message, f"use {name}={reached} or less, or fewer hosts and processes")
