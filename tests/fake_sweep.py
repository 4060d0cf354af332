"""What stands for torchrun in the tests of launch.sweep."""

import json
from pathlib import Path


class Fake:
    """Imitates torchrun: it records its arguments, and creates the directory of a run as rank 0 does."""

    def __init__(self, bad=(), speed=lambda words: 100.0):
        self.bad, self.speed, self.started = bad, speed, []

    def __call__(self, overrides, nproc, log, told):
        self.started.append((tuple(overrides), nproc))
        run = Path("runs") / f"run-{len(list(Path('runs').glob('run-*')))}"
        run.mkdir(parents=True)
        told.write_text(f"{run}\n")
        log.write_text("one line\nwhy it failed\n")
        speed = self.speed(overrides)
        if speed is None or set(self.bad) & set(overrides):
            return 1
        (run / "summary.json").write_text(json.dumps({"perf/tokens_per_s": speed}))
        return 0
