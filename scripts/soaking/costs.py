"""What a step, a save and a restart cost, and what follows from it. Torch is not imported."""

from __future__ import annotations

import math
import random
import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from launch.sweeping.grid import Point
from scripts.soaking.run import Run, lasted, records

CYCLE, CYCLES, KILLS = 20, 10, 3  # steps between two saves, saves, kills
SAVE_S, STALL_MS = "checkpoint/save_s", "checkpoint/stall_ms"


@dataclass(frozen=True)
class Costs:
    """Of a strategy, in seconds. `save`: what training loses by one. `late`: how much later it is complete than
    training goes on, with checkpoint.mode=async. `restart`: from a kill to the next step."""

    step: float
    save: float
    late: float
    restart: float

    def __str__(self) -> str:
        return (
            f"  a step {1e3 * self.step:.0f} ms, a save {1e3 * self.save:.0f} ms (and {1e3 * self.late:.0f} ms until "
            f"it is complete), a restart {self.restart:.1f} s"
        )

    def every(self, mtbf: float) -> int:
        """The number of steps between two saves."""
        return max(round(math.sqrt(2 * self.save * mtbf) / self.step), 1)

    def ettr(self, every: int, rate: float) -> float:
        """The share of the time that is useful with `rate` kills a second, at any moment (Daly 2006, equation 20)."""
        useful = every * self.step
        if not rate:
            return useful / (useful + self.save)
        return useful * rate / math.expm1(rate * (useful + self.save)) / math.exp(rate * (self.restart + self.late))


def measured(folder: Path, point: Point) -> Costs:
    """What a save and a restart cost, in a run of their own. The time of CYCLE steps with a save is compared with that
    of the later of these steps, when no save is going on; it costs at least the time that training waits for it."""
    chance, restarts = random.Random(point.label), []
    words = ("train.steps=1000000", f"checkpoint.every={CYCLE}")
    with Run(folder, point, *words, restarts=KILLS).ended() as run:
        run.until(lambda: run.newest()["step"] > CYCLE * (CYCLES + 1))
        found = records(folder)
        cycles = [found[CYCLE * i - 1 : CYCLE * (i + 1)] for i in range(1, CYCLES + 1)]
        quiet = [lasted(cycle[CYCLE // 2 : CYCLE]) for cycle in cycles]
        step = statistics.median(quiet)
        longer = [CYCLE * (lasted(cycle) - one) for cycle, one in zip(cycles, quiet, strict=True)]
        saves = [(one[SAVE_S], one[STALL_MS] / 1e3) for one in found if SAVE_S in one]
        save = max(statistics.mean(longer), statistics.median(stall for _, stall in saves))
        late = max(statistics.median(whole - stall for whole, stall in saves), 0.0)
        for _ in range(KILLS):
            killed, before = time.time(), int(run.newest()["step"])
            run.kill(chance)
            first = run.until(partial(run.first_after, killed))
            restarts.append(first["time"] - killed - 2 * step)  # two steps have been made
            run.until(lambda least=before + CYCLE: run.newest()["step"] > least)  # type: ignore[misc]
    return Costs(step, save, late, statistics.mean(restarts))
