"""The command `strategy-lab`, which an installation adds: `strategy-lab local …` is `python -m launch.local …`.

In contrast to `python -m`, it does not search the working directory for modules. So it also works in a folder that has
a `train.py` of its own.
"""

from __future__ import annotations

import difflib
import runpy
import sys

from train.command.process.exits import reported_once
from train.command.process.streams import lasting
from train.config.problems import BadInput, Problem
from train.config.world import World

MODULES = {
    "local": "launch.local",
    "explain": "launch.explain",
    "plan": "launch.plan",
    "sweep": "launch.sweep",
    "netlab": "launch.netlab",
    "doctor": "launch.doctor",
    "node": "launch.node",
    "slurm": "launch.slurm",
    "kubernetes": "launch.kubernetes",
    "verify": "scripts.verify",
    "compare": "scripts.compare",
    "checkpoint": "scripts.checkpoint",
    "chat": "scripts.chat",
    "compress": "scripts.compress",
    "export": "scripts.export",
    "edge-bench": "scripts.edge_bench",
}
HELP = """\
usage: strategy-lab COMMAND [argument ...]

  local       checks a run and starts it on this machine: strategy-lab local strategy=tp nproc=4
  explain     shows what a run would do and hold, and every problem in its config, and starts nothing
  plan        finds the fastest layout of a model on so many devices that fits in their memory, and starts nothing
  sweep       runs every combination of several values, one after another, and compares the runs
  netlab      trains on hosts that this machine emulates, with links of the given speeds, and compares the strategies
  doctor      examines this machine, and says what stops or slows a run, and what to do
  node        starts one machine's part of a run on several machines
  slurm       submits a run, or a sweep as an array of jobs, to Slurm
  kubernetes  prints what runs the lab on Kubernetes, as YAML
  verify      proves that a strategy computes the same as one device
  compare     shows runs in one table, and whether their losses are equal
  checkpoint  inspects, verifies, compares and exports what runs have saved
  chat        lets a trained model continue a text
  compress    makes a trained model smaller, and measures what that costs and gains
  export      makes a file for onnxruntime, ExecuTorch or llama.cpp of a trained model, and compares it there
  edge-bench  measures such files, each in a fresh process

`strategy-lab COMMAND --help` lists the arguments of a command. torchrun itself starts a run too:
torchrun --nproc_per_node=4 -m train.main strategy=tp
"""


def main() -> None:
    """Run the command as `python -m` would, with the same arguments, signals and exit code."""
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in MODULES:
        sys.argv = [command, *arguments]
        runpy.run_module(MODULES[command], run_name="__main__", alter_sys=True)
        return
    lasting()
    with reported_once(World.single()):
        if command not in ("-h", "--help"):
            raise BadInput(_unknown(command))
        print(HELP, end="")


def _unknown(command: str) -> Problem:
    near = difflib.get_close_matches(command, MODULES, n=1)
    fix = f"use strategy-lab {near[0]}" if near else f"use one of {', '.join(MODULES)}"
    return Problem("command", f"{command} is not a command of strategy-lab", fix)
