"""Run the proof: all references in a world of one process, then the strategies in worlds of nproc processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.start.forked import run_world
from scripts.verifying.task import Task
from train.config.schema import Config, RuntimeConfig

Result = dict[str, Any]


def run_proof(
    folder: Path, task: Task, runtime: RuntimeConfig, worker: str = "train.proof.jobs", *, traced: bool = False
) -> dict[str, Result]:
    """Results by strategy, as `run_world` returns them. Equal references are made once. A strategy without a reference
    cannot be judged, so it is not run. `traced`: results also have a "search", for the first that is wrong."""
    from train.proof.jobs import Job, search_in
    from train.proof.jobs import references as reference_jobs

    limits: dict[str, Any] = {"runtime": runtime, "timeout_s": runtime.timeout_s, "worker": worker}
    references: list[Config] = []
    for subject in task.subjects.values():
        if subject.reference not in references:
            references.append(subject.reference)
    files = [folder / f"reference_{i}.pt" for i in range(len(references))]
    saves = [
        reference_jobs(f"one device {i}", replace(config, runtime=runtime), file, traced=traced)
        for i, (config, file) in enumerate(zip(references, files, strict=True))
    ]
    made = run_world(folder / "one", [job for together in saves for job in together], size=1, **limits)
    results: dict[str, Result] = {}
    jobs: dict[str, list[Job]] = {}
    for name, subject in task.subjects.items():
        number = references.index(subject.reference)
        reason = next((why for job in saves[number] if (why := why_missing(made[job.name]))), "")
        if reason:
            results[name] = {"unjudged": reason}
            continue
        # a package such as DeepSpeed changes the state of its process, so its strategies are in a world of their own
        trace = str(folder / f"trace_{name}") if traced else ""
        job = Job(name, replace(subject.config, runtime=runtime), reference=str(files[number]), trace=trace)
        jobs.setdefault(subject.config.strategy.extra or "", []).append(job)
    for package, together in jobs.items():
        results |= run_world(folder / f"all_{package}", together, size=task.nproc, **limits)
        for job in together if traced else ():
            if "verdicts" in results[job.name]:
                try:
                    results[job.name]["search"] = search_in(job, task.nproc)
                except Exception as error:  # the verdict stands, and is not lost because the search has failed
                    results[job.name]["unjudged"] = f"{type(error).__name__}: {error}"
    return results


def why_missing(result: Result) -> str:
    """Why there is no reference; empty if there is one."""
    if "error" in result:
        return f"one device could not be run: {result['error'].strip().splitlines()[-1]}"
    return str(result.get("unjudged", ""))
