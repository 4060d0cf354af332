"""Worlds of processes on this machine: one per size, started once, running all rows of that size."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.world import run_world
from tests.rows import Row
from tests.rows.base import configured
from train.prove import Job

TIMEOUT_S = "runtime.timeout_s=240"  # of a collective
SECONDS_PER_ROW = 300


def job(name: str, overrides: Sequence[str], **files: str) -> Job:
    return Job(name, configured(overrides), **files)


def world(
    folder: Path,
    jobs: Sequence[Job],
    *,
    size: int,
    timeout_s: float = SECONDS_PER_ROW,
    worker: str = "tests.worker",
) -> dict[str, dict[str, Any]]:
    """`run_world` with the time-outs of the jobs."""
    runtime = jobs[0].config.runtime
    return run_world(folder, jobs, size=size, runtime=runtime, timeout_s=timeout_s, worker=worker)


def prove(folder: Path, rows: Sequence[Row], cuda_backend: str = "") -> dict[str, dict[str, Any]]:
    """Run rows of one size after the references that they need, on the CPU or, over this backend, on a GPU. Returns
    results by row name."""
    runtime = [TIMEOUT_S, *(["runtime.device=cuda", f"runtime.backend={cuda_backend}"] if cuda_backend else [])]
    references = {" ".join(row.reference): row.reference for row in rows}
    files = {key: str(folder / f"reference_{i}.pt") for i, key in enumerate(references)}
    saves = [job(key, [*overrides, *runtime], save=files[key]) for key, overrides in references.items()]
    made = world(folder / "one", saves, size=1)
    if errors := [result["error"] for result in made.values() if "error" in result]:
        raise RuntimeError(f"a reference could not be made:\n{errors[0]}")
    jobs = [job(row.name, [*row.overrides, *runtime], reference=files[" ".join(row.reference)]) for row in rows]
    return world(folder / "rows", jobs, size=rows[0].size)
