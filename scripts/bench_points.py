"""The points of scripts/bench_strategies.sh, which calls this file: what is run, whether it may, what came of it.

    python scripts/bench_points.py list N [override …]     a line for each point on N GPUs: label, processes, overrides
    python scripts/bench_points.py check N [override …]    every rule of every point, starting nothing; exit code 2
    python scripts/bench_points.py row FILE LABEL NPROC STATUS SECONDS DIR override …    add what stands in DIR to FILE
    python scripts/bench_points.py table FILE              the results in Markdown, the newest of each point
    python scripts/bench_points.py skeleton N              the same of points on N GPUs that were not run

Batches: a rank of the data axes has 2 microbatches of 4 sequences of 4,096 tokens a step, so N GPUs share 8 N sequences
under every strategy, and a pipeline over all N has 2 N microbatches: as many as the schedules with two stages a rank
have stages, which is the least that some of them take. `llama_8b` has 1 sequence a microbatch, as `single` and `dp`
hold whole optimiser states. Context parallelism has one sequence a step, of 8,192 tokens a rank.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMMON = "precision=bf16 data=python_source train.steps=20 train.eval_every=0 train.eval_batches=1"
MODELS = {  # sequences a microbatch, and what else
    "llama_1b": (4, "model=llama_1b train.seq_len=4096"),
    "moe_1b": (4, "model=moe_1b train.seq_len=4096"),
    "llama_8b": (1, "model=llama_8b model.num_layers=8 train.seq_len=4096"),
}
MICROBATCHES = 2  # of a data rank
CP_TOKENS = 8192  # of a rank
PP = "strategy=pp strategy.schedule="
EAGER = " compile.enabled=false"

# (the least number of GPUs, label, overrides, model)
FIRST: list[tuple[int, str, str, str]] = [
    (1, "single", "strategy=single", "llama_1b"),
    (2, "dp", "strategy=dp", "llama_1b"),
    (2, "fsdp", "strategy=fsdp", "llama_1b"),
    (2, "tp", "strategy=tp", "llama_1b"),
    (2, "pp 1f1b", PP + "1f1b", "llama_1b"),
    (4, "fsdp_tp", "strategy=fsdp_tp", "llama_1b"),
    (8, "3d", "strategy=3d", "llama_1b"),
    (2, "ds_zero3", "strategy=ds_zero3", "llama_1b"),
    (2, "ds_zero2", "strategy=ds_zero2", "llama_1b"),
]
THEN: list[tuple[int, str, str, str]] = [
    (4, "hsdp", "strategy=hsdp", "llama_1b"),
    (2, "tp, whole sequences", "strategy=tp strategy.sequence_parallel=false", "llama_1b"),
    (2, "tp, async", "strategy=tp strategy.async_tp=true", "llama_1b"),
    (4, "tp_pp", "strategy=tp_pp", "llama_1b"),
    (2, "pp interleaved_1f1b", PP + "interleaved_1f1b", "llama_1b"),
    *((2, f"cp {method}", f"strategy=cp strategy.cp_method={method}", "llama_1b")
      for method in ("allgather", "ring", "ulysses")),
    (2, "ep", "strategy=ep", "moe_1b"),
    (2, "fsdp, beside ep", "strategy=fsdp", "moe_1b"),
    (2, "zero1", "strategy=zero1", "llama_1b"),
    (2, "zero2", "strategy=zero2", "llama_1b"),
    (2, "dp, bf16 gradients", "strategy=dp strategy.comm_hook=bf16", "llama_1b"),
    (2, "ds_zero1", "strategy=ds_zero1", "llama_1b"),
    (2, "ds_pp", "strategy=ds_pp", "llama_1b"),
    (4, "dp_pp", "strategy=dp_pp", "llama_1b"),
    (4, "fsdp_pp", "strategy=fsdp_pp", "llama_1b"),
    (4, "fsdp_cp", "strategy=fsdp_cp", "llama_1b"),
    (4, "cp_tp", "strategy=cp_tp", "llama_1b"),
    (8, "moe_3d", "strategy=moe_3d", "moe_1b"),
    (2, "pp gpipe", PP + "gpipe", "llama_1b"),
    (2, "pp looped_bfs", PP + "looped_bfs", "llama_1b"),
    # a schedule that splits the backward refuses compiled stages: these have an eager 1f1b beside them
    (2, "pp 1f1b, eager", PP + "1f1b" + EAGER, "llama_1b"),
    (2, "pp interleaved_zero_bubble, eager", PP + "interleaved_zero_bubble" + EAGER, "llama_1b"),
    (2, "pp zbv_zero_bubble, eager", PP + "zbv_zero_bubble" + EAGER, "llama_1b"),
    (2, "pp dualpipev, eager", PP + "dualpipev" + EAGER, "llama_1b"),
]  # fmt: skip
SPEED = "perf/tokens_per_s_per_device"
SCALED = ("dp", "fsdp", "tp", "pp 1f1b")  # from 1 GPU to N


@dataclass(frozen=True)
class Point:
    label: str
    nproc: int
    overrides: tuple[str, ...]


def points(num_gpus: int, more: tuple[str, ...] = ()) -> list[Point]:
    """The most telling first: every strategy on `llama_1b`, the first eight on `llama_8b`, then from 1 GPU to N."""
    here = [entry for entry in (*FIRST, *THEN) if entry[0] <= num_gpus]
    made = [_point(label, 1 if least == 1 else num_gpus, words, model, more) for least, label, words, model in here]
    for least, label, words, _ in FIRST[:8]:
        if least <= num_gpus:
            nproc = 1 if least == 1 else num_gpus
            made.append(_point(f"{label}, 8 layers of 8B", nproc, words, "llama_8b", more))
    for nproc in (n for n in (1, 2, 4) if n < num_gpus):
        made += [_point(label, nproc, words, model, more) for _, label, words, model in FIRST if label in SCALED]
    return made


def _point(label: str, nproc: int, words: str, model: str, more: tuple[str, ...]) -> Point:
    micro, shape = MODELS[model]
    batch = MICROBATCHES * micro * nproc
    if "strategy=cp " in words:
        micro, batch, shape = 1, 1, f"{shape} train.seq_len={CP_TOKENS * nproc}"
    sizes = f"train.micro_batch_size={micro} train.global_batch_size={batch}"
    compiled = "" if EAGER in words else "compile.enabled=true"
    # a later override of the same key wins
    return Point(label, nproc, (*f"{words} {shape} {sizes} {compiled} {COMMON}".split(), *more))


def check(num_gpus: int, more: tuple[str, ...] = ()) -> list[str]:
    """What is wrong with the points, a line for each problem; needs no GPU."""
    from train import cli
    from train.data import load_corpus
    from train.problems import BadInput
    from train.validate import validate

    parser, found, longest = cli.parser("scripts/bench_points.py", __doc__ or ""), [], None
    for point in points(num_gpus, more):
        try:
            config, _, _ = cli.parse(parser, list(point.overrides))
        except BadInput as error:
            found.append(f"{point.label}: {error}")
            continue
        found += [f"{point.label} on {point.nproc}: {problem}" for problem in validate(config, point.nproc)]
        if longest is None or config.train.seq_len > longest.train.seq_len:
            longest = config
    if longest is not None:
        try:
            load_corpus(longest)
        except BadInput as error:
            found.append(str(error))
    return found


def row(point: Point, status: str, seconds: float, folder: Path) -> dict[str, Any]:
    """What stands in a point's folder: `log`, and under `runs` what a run left, if one started."""
    result: dict[str, Any] = {"label": point.label, "nproc": point.nproc, "status": status, "seconds": seconds}
    result["overrides"] = " ".join(point.overrides)
    log = (folder / "log").read_text(errors="replace")
    if said := verdicts(log):
        result["verdicts"] = said
    if status != "ok" and not said:
        result["why"] = why(log)
    for run in (folder / "runs").glob("*/metrics.jsonl"):
        result |= figures(run.parent)
    return result


def verdicts(log: str) -> dict[str, str]:
    """By strategy, what scripts/verify.py found."""
    found, name = {}, ""
    for line in log.splitlines():
        if heading := re.match(r"(\w+) on \d+ process", line):
            name = heading[1]
        elif name and (line.startswith(("  equals", "  DIFFERS")) or "could not be run" in line):
            found[name] = line.strip()
    return found


def why(log: str) -> str:
    """The first line that names an error, else the last."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return next(
        (line for line in lines if re.search(r"Error: |out of memory|: use |needs ", line)), lines[-1] if lines else ""
    )[:300]


def figures(folder: Path) -> dict[str, Any]:
    """Of a run, also of one that was stopped: medians of speeds and the largest of memory after warm-up, else a tag's
    last value."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/loss" in line]
    measured = steps[5:] or steps
    summary = json.loads((folder / "summary.json").read_text()) if (folder / "summary.json").exists() else {}
    facts = {name: summary[name] for name in ("commit", "torch", "device", "first_step_s") if name in summary}
    result: dict[str, Any] = facts | {"run": folder.name, "steps": len(steps), "steps_measured": len(measured)}
    for tag in dict.fromkeys(tag for line in measured for tag in line if "/" in tag and "by_rank" not in tag):
        values = [line[tag] for line in measured if tag in line]
        how = statistics.median if tag.startswith("perf/") else max if tag.startswith("memory/") else lambda v: v[-1]
        result[tag] = how(values)
    return result


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: every point, and efficiency from 1 GPU up. A cell whose figure is missing says so."""
    names = ("point", "GPUs", "tokens/s a GPU", "MFU, %", "peak, GiB", "state, MiB", "sent a step, MiB",
             "exposed, ms", "bubble, %", "steps")  # fmt: skip
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    newest = {(r["label"], r["nproc"]): r for r in rows if not r["label"].startswith("verify")}
    for r in newest.values():
        missing = "not run" if r["status"] == "not run" else "not measured"
        state = [r.get(f"memory/{kind}_mib") for kind in ("parameters", "gradients", "optimiser")]
        measured = r.get("steps_measured", 0)
        cells = [
            r["label"], str(r["nproc"]), _shown(r, SPEED, ",.0f"), _shown(r, "perf/mfu_pct", ".1f"),
            _shown(r, "memory/peak_allocated_gib", ".1f"),
            " + ".join(f"{size:,.0f}" for size in state if size is not None),
            _by_axis(r, "_mib"), _by_axis(r, "_exposed_ms"), _shown(r, "pipeline/bubble_pct", ".1f"),
            f"{measured}" if r["status"] == "ok" else f"{measured} ({r['status']})" if measured else r["status"],
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cell or missing for cell in cells)} |")
    facts = {f"{r['device']}, torch {r['torch']}, commit {r['commit']}" for r in newest.values() if "device" in r}
    return "\n".join([*sorted(facts), "", *lines, "", *scaling(newest)])


def scaling(newest: dict[tuple[str, int], dict[str, Any]]) -> list[str]:
    """Tokens/s a GPU over those of `single`, each GPU with the same share of the batch; lines of Markdown."""
    sizes = sorted({nproc for label, nproc in newest if label in SCALED})
    lines = [f"| over `single`, % | {' | '.join(f'{n} GPU' for n in sizes)} |", "|---" * (len(sizes) + 1) + "|"]
    one = newest.get(("single", 1), {}).get(SPEED)
    for label in SCALED:
        speeds = [newest.get((label, n), {}).get(SPEED) for n in sizes]
        cells = [f"{100 * speed / one:.1f}" if speed and one else "not run" for speed in speeds]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def _shown(r: dict[str, Any], tag: str, spec: str) -> str:
    return format(r[tag], spec) if tag in r else ""


def _by_axis(r: dict[str, Any], suffix: str) -> str:
    """`tp 1,024; pp 64`: comm/<axis>/<op><suffix>, summed over operations."""
    totals: dict[str, float] = {}
    for tag, value in r.items():
        if tag.startswith("comm/") and tag.endswith(suffix):
            axis = tag.split("/")[1]
            totals[axis] = totals.get(axis, 0.0) + value
    return "; ".join(f"{axis} {value:,.0f}" for axis, value in totals.items())


def main(argv: list[str]) -> int:
    command, *rest = argv
    if command == "table":
        print(table([json.loads(line) for line in Path(rest[0]).read_text().splitlines()]))
        return 0
    if command == "skeleton":
        made = [{"label": point.label, "nproc": point.nproc, "status": "not run"} for point in points(int(rest[0]))]
        print(table(made))
        return 0
    if command == "row":
        file, label, nproc, status, seconds, folder, *overrides = rest
        added = row(Point(label, int(nproc), tuple(overrides)), status, float(seconds), Path(folder))
        with Path(file).open("a") as out:
            out.write(json.dumps(added) + "\n")
        print(f"{label} on {nproc}: {status}, {seconds} s {added.get('why', '')}")
        return 0
    num_gpus, more = int(rest[0]), tuple(rest[1:])
    if command == "list":
        for point in points(num_gpus, more):
            print("\t".join([point.label, str(point.nproc), " ".join(point.overrides)]))
        return 0
    problems = check(num_gpus, more)
    print("\n".join(problems) or f"{len(points(num_gpus, more))} points on {num_gpus} GPUs: no problem")
    return 2 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
