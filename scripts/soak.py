"""Kill ranks at random moments, and measure what that costs: python scripts/soak.py strategy=dp,fsdp nproc=2

It takes all overrides of train/main.py, several strategies, and the options that --help shows. Each strategy trains for
`minutes` undisturbed. Then, for each `mtbf_s`, it makes the same steps again under `launch.local restarts=…`, while
again and again a random rank is killed, also one that is just starting. There are as many kills as come in this time on
average, and at least one; their moments are those of a Poisson process of which this number is known: drawn uniformly.

ETTR, the effective training time ratio, is the time of the undisturbed run in percent of that of the run with kills. As
the speed of a machine changes, the first is scaled by the time that a step takes in the second while nothing is saved
and no rank is lost. The ETTR is predicted from what is measured before: the time of a step, what a save costs, and how
long a restart takes from the kill of a rank to the next step. A save is made every sqrt(2 x save x mtbf_s) seconds
(Young 1974).

The losses must be those of the undisturbed run, each step once; otherwise the exit code is 1. Results are lines of
build/soak.jsonl, and what has a line there is not run again; runs of a strategy that is not finished are in build/soak.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from launch.sweeping.grid import Point, check_all, expand
from scripts.soaking.costs import CYCLE, Costs, measured
from scripts.soaking.run import LOSS, POLL_S, Record, Run, files, lasted, quiet_step, records
from train.checkpoint.folder import complete
from train.command import cli, options
from train.command.process.exits import leave_on_interrupt, reported_once
from train.command.process.streams import lasting
from train.config import plain_json
from train.config.problems import BadInput
from train.config.world import World

BUILD = Path("build")
CLEAN = "clean"  # the folder of the undisturbed run


@dataclass(frozen=True)
class Result:
    """A run with kills. `kills`: how many; `seconds`: its time; `slower`: the time of a step while nothing is saved and
    no rank is lost, in units of that of the undisturbed run; `mttr_s`: the median time from a kill to the next step;
    `redone`: the mean number of steps that a kill made necessary again; the other times are those of `Costs`."""

    strategy: str
    line: list[str]
    nproc: int
    minutes: float
    mtbf_s: float
    steps: int
    every: int
    costs: Costs
    kills: int
    seconds: float
    slower: float
    mttr_s: float
    redone: float
    ettr: float
    predicted: float
    equal: bool
    commit: str

    def __str__(self) -> str:
        end = "the losses are those of the undisturbed run" if self.equal else "THE LOSSES DIFFER, or it failed"
        return (
            f"  a kill in {self.mtbf_s:g} s: {self.steps} steps in {self.seconds:.0f} s, saved every {self.every}, "
            f"a step {self.slower:.3f} times as long; "
            f"{self.kills} kills, MTTR {self.mttr_s:.1f} s, {self.redone:.1f} steps again for each; "
            f"ETTR {100 * self.ettr:.1f} %, predicted {100 * self.predicted:.1f} %; {end}"
        )


def with_kills(folder: Path, point: Point, minutes: float, mtbf: float, costs: Costs, clean: list[Record]) -> Result:
    """Make the steps of the undisturbed run `clean` again, with kills."""
    chance, every, steps = random.Random(f"{point.label} {mtbf}"), costs.every(mtbf), len(clean)
    words = (f"train.steps={steps}", f"checkpoint.every={every}")
    lasts = steps * costs.step / costs.ettr(every, 1 / mtbf)  # so long the run is expected to last
    moments = sorted(chance.uniform(0, lasts) for _ in range(max(round(lasts / mtbf), 1)))
    kills: list[float] = []  # when
    down = None
    repairs, redone = [0.0], [0]
    with Run(folder, point, *words, restarts=options.MAX_RESTARTS).ended() as run:
        run.until(lambda: any(complete(path.parent) for path in files(folder, "checkpoints")))
        started = records(folder)[0]["time"]
        since = time.time()
        while run.process.poll() is None:
            if len(kills) < len(moments) and (now := time.time()) > since + moments[len(kills)] and run.kill(chance):
                kills.append(now)
                down = down or (now, run.newest()["step"])
            if down and (first := run.first_after(kills[-1])):
                repairs.append(first["time"] - down[0])
                redone.append(down[1] - first["step"] + 1)
                down = None
            time.sleep(POLL_S)
    found = records(folder)
    seconds = found[-1]["time"] - started
    same = [(one["step"], one[LOSS]) for one in found] == [(one["step"], one[LOSS]) for one in clean]
    (summary,) = files(folder.parent / CLEAN, "summary.json")
    step = quiet_step(found, every, kills)
    slower, costs = step / costs.step, dataclasses.replace(costs, step=step)
    return Result(
        point.label, [*point.overrides], point.nproc, minutes, mtbf, steps, every, costs, len(kills), seconds, slower,
        statistics.median(repairs[1:] or repairs), statistics.mean(redone[1:] or redone),
        (steps - 1) * costs.step / seconds, costs.ettr(every, len(kills) / seconds),
        same and run.process.returncode == 0, json.loads(summary.read_text())["commit"],
    )  # fmt: skip


def prepared(folder: Path, point: Point, minutes: float) -> tuple[Costs, list[Record]]:
    """The costs, and the records of the undisturbed run, unless an earlier start has measured them."""
    kept = folder / "costs.json"
    if not kept.exists():
        costs = measured(folder / "measured", point)
        steps = max(round(60 * minutes / costs.step), 2 * CYCLE)
        # it saves after its last step only, when the time of all steps is recorded
        run = Run(folder / CLEAN, point, f"train.steps={steps}", f"checkpoint.every={steps}")
        with run.ended():
            run.until(lambda: run.process.poll() == 0)
        costs = dataclasses.replace(costs, step=lasted(records(folder / CLEAN)))
        kept.write_text(plain_json.dumps(dataclasses.asdict(costs)))
    return Costs(**json.loads(kept.read_text())), records(folder / CLEAN)


def main(argv: list[str]) -> int:
    leave_on_interrupt()
    with reported_once(World.single()):
        argv = [*argv]
        (minutes,), mtbfs = options.MINUTES.pop(argv), options.MTBF_S.pop(argv)
        parser = cli.parser(options.SOAK, __doc__ or "")
        words = parser.parse_intermixed_args(argv)
        if words.help:
            cli.show_help(parser, [point.overrides for point in expand(words.overrides)])
        checked = check_all(parser, expand(words.overrides), "global")
        if problems := dict.fromkeys(problem for one in checked for problem in one.problems):
            raise BadInput(*problems)
    BUILD.mkdir(exist_ok=True)
    file, good = BUILD / "soak.jsonl", True
    for point in (one.point for one in checked):
        key = [[*point.overrides], point.nproc, minutes]
        folder = BUILD / "soak" / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:8]
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        done = {one["mtbf_s"]: one for one in lines if [one["line"], one["nproc"], one["minutes"]] == key}
        print(f"{point.label} on {point.nproc}", flush=True)
        for mtbf in mtbfs:
            if mtbf in done:
                result = Result(**done[mtbf] | {"costs": Costs(**done[mtbf]["costs"])})
            else:
                costs, clean = prepared(folder, point, minutes)
                print(costs, flush=True)
                result = with_kills(folder / "killed", point, minutes, mtbf, costs, clean)
                with file.open("a") as out:
                    out.write(plain_json.dumps(dataclasses.asdict(result)) + "\n")
            print(result, flush=True)
            good = good and result.equal
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if good else 1


if __name__ == "__main__":
    lasting()
    sys.exit(main(sys.argv[1:]))
