"""Prove that a strategy computes what one device computes: python scripts/verify.py strategy=fsdp_tp nproc=4

Takes every override that train/main.py takes, and the options that --help shows; strategy=dp,fsdp,tp proves several
strategies in one world. It compares them with strategy=single under the same other overrides, on the same kind
of device: the loss, every gradient, the global norm, every weight after an SGD step, and the loss over AdamW steps. The
exit code is 1 if anything differs but what the strategy says differs (`Strategy.differs`), and 2 or 3 if nothing could
be started; a rank that dies or hangs ends the command within runtime.timeout_s.
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
    """What to prove: configs by strategy, and that of the one-device reference."""

    nproc: int
    configs: dict[str, Config]
    reference: Config


def main(argv: list[str], worker: str = "train.proof.jobs") -> int:
    """The exit code. `worker`: the module that each rank runs."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no rank is left behind
    with reported_once(World.single()):
        task = read(argv)
    from train.ranks.distributed import choose_runtime

    os.environ.update(loopback() | os.environ)
    config = task.reference
    runtime = choose_runtime(config.runtime, World(0, 0, task.nproc, task.nproc, from_torchrun=True))
    if runtime.note:
        print(runtime.note)
    # `auto` for one process may be another device than for several: both get the one that several get
    where = replace(config.runtime, device=runtime.device.type, backend=runtime.backend)
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        results = prove(Path(folder), task, where, worker)
    print(f"against one {runtime.device.type} process, precision={config.precision.value}, backend {runtime.backend}")
    good = [report(Plan(task.configs[name], task.nproc), results[name]) for name in task.configs]
    return 0 if all(good) else 1


def read(argv: list[str]) -> Task:
    """Check everything that can be checked before a process is started. Raises BadInput."""
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
            message = f"model.dropout={config.model.dropout} draws other masks where ranks hold other tokens"
            raise BadInput(Problem("dropout", message, "use model.dropout=0", ("model.dropout=0",)))
    check_text(config, nproc)
    check_machine(config, nproc, None)
    for config in parsed.values():
        if not force:
            check_memory(config, nproc)
    # degrees and options belong to the strategy; the model, the data, the batch and the precision to both
    shared = [word for word in args.overrides if not word.lstrip("+~").startswith(("strategy=", "strategy."))]
    return Task(nproc, parsed, cli.configured(["strategy=single", *shared]))


def prove(
    folder: Path, task: Task, runtime: RuntimeConfig, worker: str = "train.proof.jobs"
) -> dict[str, dict[str, Any]]:
    """Results by strategy."""
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
    """Print a strategy's table; whether it equals one device."""
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
    wrong = [v.column for v in verdicts if not v.ok]
    expected = [v.column for v in verdicts if v.ok and not v.equal]
    but = f" but for {', '.join(expected)}, as expected" if expected else ""
    if lossy and lossy.bound is None:  # of steps before it starts
        but += f"; what {lossy.option} leaves out is not in these few steps"
    print(f"  {'DIFFERS from one device in ' + ', '.join(wrong) if wrong else 'equals one device' + but}")
    return not wrong


if __name__ == "__main__":
    lasting()
    sys.exit(main(sys.argv[1:]))
