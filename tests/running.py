"""Runs jobs and rows in worlds of processes on this machine: one world for each size, with all rows of that size."""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.start.forked import run_world
from tests.rows import Row
from tests.rows.base import BASE, configured
from train.proof.jobs import Job, search_in
from train.proof.jobs import references as reference_jobs

TIMEOUT_S = "runtime.timeout_s=240"  # of a collective
SECONDS_PER_ROW = 300


def job(name: str, overrides: Sequence[str], **options: Any) -> Job:
    return Job(name, configured(overrides), **options)


def run_jobs(
    folder: Path,
    jobs: Sequence[Job],
    *,
    size: int,
    timeout_s: float = SECONDS_PER_ROW,
    worker: str = "tests.worker",
) -> dict[str, dict[str, Any]]:
    """`run_world` with the time-outs of the jobs. Writes world.json, which says where the time went."""
    runtime, started = jobs[0].config.runtime, time.perf_counter()
    results = run_world(folder, jobs, size=size, runtime=runtime, timeout_s=timeout_s, worker=worker)
    rows = {name: {key: result.get(key) for key in ("seconds", "phases")} for name, result in results.items()}
    test = os.environ.get("PYTEST_CURRENT_TEST", "").partition(" (")[0]
    record = {"test": test, "size": size, "seconds": time.perf_counter() - started, "rows": rows}
    (folder / "world.json").write_text(json.dumps(record))
    return results


def run_rows(
    folder: Path, rows: Sequence[Row], cuda_backend: str = "", *, traced: bool = False
) -> dict[str, dict[str, Any]]:
    """Run the rows of one size, after the references that they need, on the CPU or with this backend on a GPU. Returns
    the results by row name. A reference is made once, and all tables and sizes of a test run use it from one folder. A
    row whose reference cannot be judged is not run. `traced`: each result also has a "finding", the first thing that is
    wrong in the row, or None."""
    runtime = [TIMEOUT_S, *(["runtime.device=cuda", f"runtime.backend={cuda_backend}"] if cuda_backend else [])]
    references = {" ".join([*row.reference, *runtime]): row.reference for row in rows}
    kept = folder.parent / "references"
    kept.mkdir(exist_ok=True)
    files = {key: kept / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt" for key in references}
    saves = []
    for key, overrides in references.items():
        # another test may have made it without a trace
        last = files[key].with_name(f"{files[key].name}.moved.rank_0") if traced else files[key]
        if not last.exists():
            name = f"one device: {' '.join(overrides[len(BASE) :])}"
            saves += reference_jobs(name, configured([*overrides, *runtime]), files[key], traced=traced)
    made = run_jobs(folder / "one", saves, size=1) if saves else {}
    unjudged = {one.save: made[one.name]["unjudged"] for one in saves if "unjudged" in made[one.name]}
    errors = [made[one.name]["error"] for one in saves if "error" in made[one.name] and one.reference not in unjudged]
    if errors:
        raise RuntimeError(f"a reference could not be made:\n{errors[0]}")
    keys = {row.name: " ".join([*row.reference, *runtime]) for row in rows}
    traces = {row.name: str(folder / f"trace_{i}") if traced else "" for i, row in enumerate(rows)}
    jobs = [
        job(row.name, [*row.overrides, *runtime], reference=str(files[keys[row.name]]), trace=traces[row.name])
        for row in rows
    ]
    results = {one.name: {"unjudged": unjudged[one.reference]} for one in jobs if one.reference in unjudged}
    if judged := [one for one in jobs if one.name not in results]:
        results |= run_jobs(folder / "rows", judged, size=rows[0].size)
    for one in jobs if traced else []:
        if "verdicts" in results[one.name]:
            started, search = time.perf_counter(), search_in(one, rows[0].size)
            results[one.name] |= {"finding": search.finding, "locating_seconds": time.perf_counter() - started}
    return results
