"""Worlds of processes on this machine: one per size, started once, running all rows of that size."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.rows import Row

REPO = Path(__file__).resolve().parent.parent
SECONDS_PER_ROW, SECONDS_TO_START = 60, 60


def run_world(folder: Path, size: int, jobs: list[dict], runtime: Sequence[str] = ()) -> dict[str, dict]:
    """Start `size` ranks, wait for them within a time that grows with the rows, and return the results by row."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps({"rows": jobs, "runtime": list(runtime)}))
    (folder / "results.jsonl").write_text("")
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(REPO), *sys.path])}
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.worker"]
    logs = [(folder / f"rank_{rank}.log").open("w") for rank in range(size)]
    ranks = [
        subprocess.Popen([*command, str(rank), str(size), str(folder)], cwd=REPO, env=env, stdout=log, stderr=log)
        for rank, log in enumerate(logs)
    ]
    try:
        for process in ranks:
            process.wait(timeout=SECONDS_TO_START + SECONDS_PER_ROW * len(jobs))
    finally:
        for process in ranks:
            process.kill()
        for log in logs:
            log.close()
    results: dict[str, dict] = {}
    for result in map(json.loads, (folder / "results.jsonl").read_text().splitlines()):
        results[result["name"]] = result | results.get(result["name"], {})  # any rank's error stays
    if any(process.returncode for process in ranks):
        codes = [process.returncode for process in ranks]
        tail = f"exit codes {codes}\n" + "\n".join((folder / f"rank_{i}.log").read_text()[-3000:] for i in range(size))
        for job in jobs:
            results.setdefault(job["name"], {"error": f"the world died before this row:\n{tail}"})
    return results


def prove(folder: Path, rows: Sequence[Row], runtime: Sequence[str] = ()) -> dict[str, dict]:
    """Run rows of one size after the references that they need. Returns results by row name."""
    references = {" ".join(row.reference): row.reference for row in rows}
    files = {key: f"reference_{i}.pt" for i, key in enumerate(references)}
    saves = [{"name": key, "overrides": [*o, *runtime], "save": files[key]} for key, o in references.items()]
    made = run_world(folder, 1, saves, runtime)
    if errors := [result["error"] for result in made.values() if "error" in result]:
        raise RuntimeError(f"a reference could not be made:\n{errors[0]}")
    (folder / "store").unlink(missing_ok=True)
    jobs = [
        {
            "name": row.name,
            "overrides": [*row.overrides, *runtime],
            "bug": row.bug,
            "bound": row.bound,
            "reference": files[" ".join(row.reference)],
        }
        for row in rows
    ]
    return run_world(folder, rows[0].size, jobs, runtime)
