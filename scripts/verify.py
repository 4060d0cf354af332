"""Verify that a strategy computes the same as one device: python scripts/verify.py strategy=fsdp_tp nproc=4

It takes all overrides of train/main.py, and the options that --help shows. strategy=dp,fsdp,tp verifies several
strategies with one command, and strategy=all every preset that can run on nproc processes.

Each strategy is compared with strategy=single under the same other overrides, on the same kind of device: the loss,
every gradient, the global norm, every weight after an SGD step, and the loss over AdamW steps. Typed values are never
changed. Precision and sizes that are not typed are chosen for each strategy: the smallest that exercise what it can do.
What the typed values do not try is printed as "not exercised".

Where a strategy differs, it is run once more, and the first thing that is wrong is named: a module's output, the
gradient of one, or a part of the update; with the axis of the mesh and the likely kind of mistake. locate=true looks
for it in any case, and --html FILE shows it as a page.

The exit code is 0 if every strategy equals one device but for what it declares to differ (`Strategy.differs`), 1 if
one differs or could not be run, 4 if one cannot be judged, and 2 (input) or 3 (environment) if nothing could be
started. If a rank dies or hangs, the command ends within runtime.timeout_s.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

from launch.start.environment import loopback
from scripts.verifying import task as tasks
from scripts.verifying.page import write_page
from scripts.verifying.places import add_places
from scripts.verifying.report import exit_code, introduce, report, summarise
from scripts.verifying.task import Task
from scripts.verifying.worlds import run_proof
from train.command.process.exits import reported_once
from train.command.process.streams import lasting
from train.config.plan import Plan
from train.config.world import World


def main(argv: list[str], worker: str = "train.proof.jobs") -> int:
    """Run the proof. Returns the exit code. `worker`: the module that each rank runs."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no rank keeps running
    with reported_once(World.single()):
        task = read(argv)
    from train.ranks.distributed import choose_runtime

    os.environ.update(loopback() | os.environ)
    asked = next(iter(task.subjects.values())).reference.runtime
    runtime = choose_runtime(asked, World(0, 0, task.nproc, task.nproc, from_torchrun=True))
    if runtime.note:
        print(runtime.note)
    print(f"against one {runtime.device.type} process, backend {runtime.backend}", flush=True)
    if task.left_out:
        print(f"not with nproc={task.nproc}: {'; '.join(f'{name} {why}' for name, why in task.left_out.items())}")
    # `auto` may choose another device for one process than for several, so both use the choice for several
    where = replace(asked, device=runtime.device.type, backend=runtime.backend)
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        results = run_proof(Path(folder) / "proof", task, where, worker)
        add_places(
            results, task, partial(run_proof, Path(folder) / "places", runtime=where, worker=worker, traced=True)
        )
    judgements = []
    for name, subject in task.subjects.items():
        plan = Plan(subject.config, task.nproc)
        introduce(plan, subject.chosen, subject.replaced)
        judgements.append(report(plan, results[name]))
    if task.html:
        try:
            write_page(task.html, judgements)
        except OSError as error:  # the answers stand without it
            print(f"{task.html} cannot be written ({error.strerror})", file=sys.stderr)
    if len(judgements) > 1:
        summarise(judgements)
    return exit_code(judgements)


def read(argv: list[str]) -> Task:
    """Read the command line, and check all that can be checked before a process is started. Raises BadInput."""
    return tasks.read(argv, __doc__ or "")


if __name__ == "__main__":
    lasting()
    sys.exit(main(sys.argv[1:]))
