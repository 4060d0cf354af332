"""Worlds of processes on this machine: one per size, started once, running all rows of that size."""

from collections.abc import Sequence
from pathlib import Path

from launch.world import run_world
from tests.rows import Row
from train.prove import Job

TIMEOUT_S = "runtime.timeout_s=240"  # of a collective
SECONDS_PER_ROW = 300


def prove(folder: Path, rows: Sequence[Row], runtime: Sequence[str] = ()) -> dict[str, dict]:
    """Run rows of one size after the references that they need. Returns results by row name."""
    runtime = [*runtime, TIMEOUT_S]
    references = {" ".join(row.reference): row.reference for row in rows}
    files = {key: str(folder / f"reference_{i}.pt") for i, key in enumerate(references)}
    saves = [Job(key, [*overrides, *runtime], save=files[key]) for key, overrides in references.items()]
    made = run_world(folder / "one", saves, size=1, runtime=runtime, timeout_s=SECONDS_PER_ROW, worker="tests.worker")
    if errors := [result["error"] for result in made.values() if "error" in result]:
        raise RuntimeError(f"a reference could not be made:\n{errors[0]}")
    jobs = [Job(row.name, [*row.overrides, *runtime], reference=files[" ".join(row.reference)]) for row in rows]
    return run_world(
        folder / "rows",
        jobs,
        size=rows[0].size,
        runtime=runtime,
        timeout_s=SECONDS_PER_ROW,
        worker="tests.worker",
    )
