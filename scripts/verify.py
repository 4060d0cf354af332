"""Verify that a strategy computes the same as one device: python scripts/verify.py strategy=fsdp_tp nproc=4

It takes all overrides of train/main.py, and the options that --help shows. strategy=dp,fsdp,tp verifies several
strategies in one world.

Each strategy is compared with strategy=single under the same other overrides, on the same kind of device: the loss,
every gradient, the global norm, every weight after an SGD step, and the loss over AdamW steps. The exit code is 1 if
anything differs that the strategy does not declare to differ (`Strategy.differs`), and 2 or 3 if nothing could be
started. If a rank dies or hangs, the command ends within runtime.timeout_s.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.describe.memory import check_memory
from launch.local import check_machine, check_text
from launch.start.environment import loopback
from launch.start.forked import run_world
from train.command import cli, options
from train.command.process.exits import reported_once
from train.command.process.streams import lasting
from train.config.plan import Plan
from train.config.problems import BadInput, Problem
from train.config.schema import Config, RuntimeConfig
from train.config.world import World


@dataclass(frozen=True)
class Task:
    """What to verify: the configs by strategy, and the config of the reference on one device."""

    nproc: int
    configs: dict[str, Config]
    reference: Config


def main(argv: list[str], worker: str = "train.proof.jobs") -> int:
    """Run the proof. Returns the exit code. `worker`: the module that each rank runs."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no rank keeps running
    with reported_once(World.single()):
        task = read(argv)
    from train.ranks.distributed import choose_runtime

    os.environ.update(loopback() | os.environ)
    config = task.reference
    runtime = choose_runtime(config.runtime, World(0, 0, task.nproc, task.nproc, from_torchrun=True))
    if runtime.note:
        print(runtime.note)
    # `auto` may choose another device for one process than for several, so both use the choice for several
    where = replace(config.runtime, device=runtime.device.type, backend=runtime.backend)
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        results = run_proof(Path(folder), task, where, worker)
    print(f"against one {runtime.device.type} process, precision={config.precision.value}, backend {runtime.backend}")
    good = [report(Plan(task.configs[name], task.nproc), results[name]) for name in task.configs]
    return 0 if all(good) else 1


def read(argv: list[str]) -> Task:
    """Read the command line, and check all that can be checked before a process is started. Raises BadInput."""
    argv = list(argv)
    nproc, force = options.NPROC.pop(argv), options.FORCE.pop(argv)
    parser = cli.parser(options.VERIFY, __doc__ or "")
    given = [arg for arg in argv if arg.startswith("strategy=")]
    others = [arg for arg in argv if arg not in given]
    names = given[-1].partition("=")[2].split(",") if given else []
    lines = [[f"strategy={name}", *others] for name in names] or [others]
    if parser.parse_intermixed_args(argv).help:
        cli.show_help(parser, lines)
    parsed = {}
    for line in lines:
        config, _, args = cli.parse(parser, line)
        parsed[config.strategy.name] = config
    for config in parsed.values():
        cli.check(config, nproc)
        if config.model.dropout > 0:
            message = f"model.dropout={config.model.dropout} draws masks that differ from those of one device"
            raise BadInput(Problem("dropout", message, "use model.dropout=0", ("model.dropout=0",)))
    check_text(config, nproc)
    check_machine(config, nproc, None)
    for config in parsed.values():
        if not force:
            check_memory(config, nproc)
    # degrees and options apply only to the strategy; model, data, batch and precision also to the reference
    shared = [word for word in args.overrides if not word.lstrip("+~").startswith(("strategy=", "strategy."))]
    return Task(nproc, parsed, cli.configured(["strategy=single", *shared]))


def run_proof(
    folder: Path, task: Task, runtime: RuntimeConfig, worker: str = "train.proof.jobs"
) -> dict[str, dict[str, Any]]:
    """Run the reference, and then all strategies in one world. Returns the results by strategy."""
    from train.proof.jobs import Job

    evidence = str(folder / "reference.pt")
    single = Job("the reference", replace(task.reference, runtime=runtime), save=evidence)
    limits: dict[str, Any] = {"runtime": runtime, "timeout_s": runtime.timeout_s, "worker": worker}
    made = run_world(folder / "one", [single], size=1, **limits)
    if "error" in made[single.name]:
        return dict.fromkeys(task.configs, made[single.name])
    jobs = [Job(name, replace(config, runtime=runtime), reference=evidence) for name, config in task.configs.items()]
    return run_world(folder / "all", jobs, size=task.nproc, **limits)


def report(plan: Plan, result: dict[str, Any]) -> bool:
    """Print the table of a strategy. Returns whether it equals one device."""
    from train.proof.comparison import Verdict

    shape = " x ".join(f"{axis} {plan.degrees[axis]}" for axis in plan.axes) or "one device"
    print(f"\n{plan.config.strategy.name} on {plan.world_size} process(es): {shape}")
    if "error" in result:
        print(f"  {result.get('name')} could not be run:")
        print("\n".join(f"    {line}" for line in result["error"].strip().splitlines()))
        return False
    lossy = plan.config.strategy.lossy()
    if lossy:
        print(f"  {lossy}")
    verdicts = [Verdict(*values) for values in result["verdicts"]]
    width = max(len(verdict.name) for verdict in verdicts)
    print(f"  {'':<14}{'worst':<{width}}  {'error':>8}  {'bound':>6}")
    for v in verdicts:
        answer = "ok" if v.equal else f"differs, as expected: {v.differs}" if v.ok else "differs"
        print(f"  {v.column:<14}{v.name:<{width}}  {v.error:>8.1e}  {v.bound:>6.0e}  {answer}")
    if facts := result["facts"]:
        replayed = f"{facts['replayed']:,} of {facts['choices']:,} choices of experts were replayed from one device"
        print(f"  {replayed}, because rounding decides them")
    wrong = [v.column for v in verdicts if not v.ok]
    allowed = [v.column for v in verdicts if v.ok and not v.equal]
    but = f" but for {', '.join(allowed)}, as expected" if allowed else ""
    if lossy and lossy.bound is None:  # it starts only after these steps
        but += f"; {lossy.option} has no effect in these few steps"
    print(f"  {'DIFFERS from one device in ' + ', '.join(wrong) if wrong else 'equals one device' + but}")
    return not wrong


if __name__ == "__main__":
    lasting()
    sys.exit(main(sys.argv[1:]))
