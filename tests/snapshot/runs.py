"""A short run of every strategy preset on the CPU, and the values that must be bitwise equal in two records."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
TIMEOUT_S = 280
# the fewest processes with which each axis of a preset that names several has two ranks; others run on 2
PROCESSES = {
    "single": 1,
    **dict.fromkeys(("cp_tp", "dp_pp", "fsdp_cp", "fsdp_pp", "fsdp_tp", "hsdp", "tp_pp"), 4),
    **dict.fromkeys(("3d", "moe_3d"), 8),
    "4d": 16,
}
MODELS = dict.fromkeys(("ep", "moe_3d"), "moe_tiny")
WORDS = (
    *("model.num_layers=2", "train.seq_len=32", "train.steps=3", "train.eval_batches=1", "runtime.device=cpu"),
    *("metrics.warmup_steps=1", "metrics.profile_every=3"),  # step 3 is recorded, and what it sends counted
)
# values that are not compared, but must be there in both, and why; the first that matches a tag is its reason
DROPPED = {
    r"^time$|^time/|^perf/|_ms$|_ms_\w+$|_s$|gb_per_s$": "a time, or a speed",
    r"^stragglers/": "follows from times",
    r"^pipeline/bubble(_theory)?_pct$": "follows from the times of actions",
    r"^energy|^cost/": "energy and its price",
    r"resident_gib": "memory of the host's process",
    r"^memory_at_peak/": "the fullest moment depends on when threads free what they sent: it differs from run to run",
    r"^(commit|platform|python|torch)$": "the code's commit, and the machine",
    r"^work_hash$": "it is a hash of the keys that the run reads, and such keys have been left out of it since",
}


def presets() -> list[str]:
    return sorted(path.stem for path in (REPO / "configs" / "strategy").glob("*.yaml"))


def record(folder: Path) -> bool:
    """Whether every preset has its file, <preset>.json. A preset that has one is not run again."""
    folder.mkdir(parents=True, exist_ok=True)
    complete = True
    for preset in presets():
        if not (folder / f"{preset}.json").exists():
            complete = run(preset, folder) and complete
    return complete


def run(preset: str, folder: Path) -> bool:
    """Run it, and write what it logged. False if it failed."""
    place, file = folder / preset, folder / f"{preset}.json"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    words = [f"nproc={PROCESSES.get(preset, 2)}", f"strategy={preset}", f"model={MODELS.get(preset, 'tiny')}", *WORDS]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    began = time.monotonic()
    with (place / "log.txt").open("w") as log:
        command = [sys.executable, "-m", "launch.local", *words, f"metrics.dir={place / 'runs'}"]
        try:
            code: int | str = subprocess.run(
                command, cwd=REPO, env=env, stdout=log, stderr=log, timeout=TIMEOUT_S, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = "none in time"
    seconds = time.monotonic() - began
    print(f"{preset}: {seconds:.0f} s, exit code {code}", flush=True)
    if code:
        print((place / "log.txt").read_text()[-3000:], flush=True)
        return False
    (directory,) = (path.parent for path in place.glob("runs/*/summary.json"))
    found = {"words": words, "seconds": seconds, **logged(directory)}
    partial = file.with_suffix(".part")
    partial.write_text(json.dumps(found, indent=1))
    partial.rename(file)
    return True


def logged(directory: Path) -> dict[str, Any]:
    """{"steps": {step: {tag: value}}, "summary": {tag: value}, "files": names} of a run's directory."""
    steps: dict[str, dict[str, Any]] = {}
    for line in (directory / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)  # a step's own, or those of its evaluation
        steps.setdefault(str(values.pop("step")), {}).update(values)
    names = [str(path.relative_to(directory.parent)) for path in directory.rglob("*") if path.is_file()]
    files = sorted(re.sub(r"(?<=-)[0-9a-f]{6}(?=/)", "HASH", re.sub(r"tfevents\..*", "tfevents", n)) for n in names)
    return {"steps": steps, "summary": json.loads((directory / "summary.json").read_text()), "files": files}


def reason(tag: str) -> str | None:
    """The reason why a tag is not compared; None if it is compared."""
    return next((why for pattern, why in DROPPED.items() if re.search(pattern, tag)), None)


def flat(found: dict[str, Any]) -> dict[tuple[str, str], str]:
    """{(place, tag): value} of all values, as text that is equal only if the bits are equal."""
    rows = {f"step {step}": values for step, values in found["steps"].items()} | {"summary": found["summary"]}
    result = {
        (place, tag): json.dumps(value, sort_keys=True) for place, row in rows.items() for tag, value in row.items()
    }
    return result | {("run", "words"): " ".join(found["words"]), ("run", "files"): "\n".join(found["files"])}


def compare(before: Path, after: Path) -> list[str]:
    """The differences, by preset, step and tag. Prints which tags are compared."""
    differences, compared, dropped, count = [], set[str](), dict[str, str](), 0
    names = {path.stem for folder in (before, after) for path in folder.glob("*.json")}
    for preset in sorted(names):
        files = [folder / f"{preset}.json" for folder in (before, after)]
        if not all(file.exists() for file in files):
            differences.append(f"{preset}: is in one record only")
            continue
        old, new = (flat(json.loads(file.read_text())) for file in files)
        for place, tag in dict.fromkeys([*old, *new]):
            one, other = (values.get((place, tag), "nothing") for values in (old, new))
            if (why := reason(tag)) is not None:
                dropped[tag] = why
            else:
                compared.add(tag)
                count += 1
            if one != other and (why is None or "nothing" in (one, other)):
                differences.append(f"{preset}: {place}: {tag}: {one}, then {other}")
    print(f"compared: {listed(compared)}")
    for why in dict.fromkeys(dropped.values()):
        print(f"not compared ({why}): {listed({tag for tag in dropped if dropped[tag] == why})}")
    print(f"{len(names)} presets: {count} values compared, {len(differences)} differ")
    return differences


def listed(tags: set[str]) -> str:
    return ", ".join(sorted({re.sub(r"rank_\d+$", "rank_*", tag) for tag in tags}))
