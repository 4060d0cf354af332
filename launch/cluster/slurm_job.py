"""A job of Slurm: the line of sbatch that submits launch/slurm.sbatch, and what the script then runs."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from launch.start.environment import source_path
from launch.start.nodes import Node, nodes_line
from launch.sweeping.grid import Point
from train.command.resources import path_of

PYTHON = "STRATEGY_LAB_PYTHON"  # the variable that tells the script which Python to use


@dataclass(frozen=True)
class Job:
    """`points`: one, or those of a sweep, which become an array of jobs. `options`: further ones of sbatch. `words`:
    options of launch.node."""

    nodes: int
    gpus_per_node: int
    points: Sequence[Point]
    options: tuple[str, ...] = ()
    words: tuple[str, ...] = ()

    @property
    def line(self) -> list[str]:
        gpus = [f"--gpus-per-node={self.gpus_per_node}"] if self.gpus_per_node else []
        array = [f"--array=0-{len(self.points) - 1}"] if len(self.points) > 1 else []
        how = [f"--nodes={self.nodes}", *gpus, *array, *self.options]
        return ["sbatch", *how, path_of("launch/slurm.sbatch"), *self.arguments]

    @property
    def arguments(self) -> list[str]:
        """The words of the script. Those of each point of a sweep stand after a `--` of their own."""
        each = [[f"nproc={point.nproc}", *self.words, *point.overrides] for point in self.points]
        return each[0] if len(each) == 1 else [word for words in each for word in ("--", *words)]

    @property
    def environment(self) -> dict[str, str]:
        """What sbatch passes on to the job, beside its own environment."""
        return {PYTHON: sys.executable} | source_path()

    def shown(self) -> list[str]:
        """The line, and what runs on the nodes as soon as Slurm has chosen them: their addresses and the port follow
        from this choice."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        lines = [" ".join([*variables, shlex.join(self.line)])]
        for point in self.points:
            name = f" of {point.label}" if len(self.points) > 1 else ""
            for number in sorted({0, self.nodes - 1}):
                between = ", and so on," if number > 1 else ""
                lines.append(f"#{between} node {number}{name} runs")
                lines.append(shlex.join(["torchrun", *self._of_node(point, number)]))
        return lines

    def _of_node(self, point: Point, number: int) -> list[str]:
        node = Node(number, self.nodes, "HEAD", 0, address="ADDRESS")
        line = nodes_line(point.overrides, point.nproc // self.nodes, node)
        return ["--master_port=PORT" if word == "--master_port=0" else word for word in line]
