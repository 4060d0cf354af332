"""Run directories with known figures, for tests of the code that reads them."""

import json
from typing import Any

MODEL = {
    "name": "tiny",
    "num_layers": 2,
    "dim": 128,
    "num_heads": 8,
    "num_kv_heads": 4,
    "ffn_dim": 352,
    "vocab_size": 256,
}
WORK: dict[str, Any] = {"model": MODEL, "data": {"source": "python_docs", "corpus_sha256": "ab" * 32},
        "precision": "float32", "optim": {"name": "adamw", "lr": 0.001},
        "train": {"seed": 1234, "global_batch_size": 8, "seq_len": 128, "steps": 12, "eval_batches": 8}}  # fmt: skip
PARTS = {"data": 1.0, "forward": 30.0, "backward": 60.0, "optimiser": 4.0, "communication": 20.0, "other": 5.0}
KINDS = {"parameters": 2.0, "gradients": 2.0, "optimiser": 4.0, "activations": 5.0, "communication": 1.0}
SAMPLED = 10


def make_run(folder, strategy, *, steps=12, world=2, ms=100.0, off=0.0, work=None, known=True, samples=True,
             finished=True, precision="float32", pipeline=False, name=None, keys="", **facts):  # fmt: skip
    """Write the files of a run whose n-th step takes ms + n ms; a sampled step takes twice as long. `known`: it has a
    work.json. `keys`: further keys of the strategy."""
    path = folder / (name or f"{strategy}-x{world}-ws{world}-abcdef")
    path.mkdir(parents=True)
    work = WORK | {"precision": precision} | (work or {})
    identity = {"strategy": strategy, "degrees": {"x": world}, "world_size": world}
    machine = {"torch": "2.13.0", "device": "a cpu", "commit": "0123456789"}
    command = f"torchrun --nproc_per_node={world} train/main.py strategy={strategy}"
    if known:
        work_json = {
            "work_hash": "not read",
            "work": work,
            "command": command,
            "tokens": 3500000,
            **identity,
            **machine,
        }
        (path / "work.json").write_text(json.dumps(work_json))
    (path / "config.yaml").write_text(
        f"strategy: {{name: {strategy}{keys}}}\nprecision: {precision}\ntrain: {{steps: {steps}, seed: 1234}}\n"
        "metrics: {warmup_steps: 5}\n"
    )
    lines = [
        line_of(n, ms, off, world, samples=samples and n == SAMPLED, pipeline=pipeline) for n in range(1, steps + 1)
    ]
    if finished:
        lines.append({"step": steps, "time": 2000.0, "validation/loss": 3.5 + off})
        summary = {**identity, "precision": precision, **machine,
                   "warmup_steps": 5, "validation/loss": 3.5 + off, "steps": steps, **facts}  # fmt: skip
        (path / "summary.json").write_text(json.dumps(summary))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if samples:
        write_sample(path, world, pipeline)
    return path


def line_of(n, ms, off, world, *, samples, pipeline):
    step_ms = (ms + n) * (2 if samples else 1)
    line = {"step": n, "time": 1000.0 + n, "train/loss": 5.0 - 0.1 * n + off, "perf/step_ms": step_ms,
            "perf/tokens_per_s": 1e6 / step_ms, "perf/tokens_per_s_per_device": 1e6 / step_ms / world,
            "memory/resident_gib": 0.25, "comm/tp/all_gather_mib": 3.0, "comm/tp/all_gather_calls": 7.0,
            "comm/dp_shard.cp/reduce_scatter_mib": 1.5, "comm/lab/gather_mib": 9.0}  # fmt: skip
    for kind in ("parameters", "gradients", "optimiser"):
        line[f"memory/{kind}_mib"] = KINDS[kind]
        line |= {f"memory_by_rank/{kind}_mib/rank_{r}": KINDS[kind] for r in range(world)}
    if samples:
        line |= {f"time/{part}_ms": part_ms for part, part_ms in PARTS.items()} | {"time/step_ms": sum(PARTS.values())}
        line |= {f"memory_at_peak/{kind}_mib": mib for kind, mib in KINDS.items()}
        if pipeline:
            line |= {"pipeline/bubble_pct": 25.0, "pipeline/bubble_theory_pct": 20.0}
    return line


def write_sample(path, world, pipeline):
    (path / "samples").mkdir()
    ranks = []
    for rank in range(world):
        bars = [["F", 0, 0, 0.0, 30.0], ["B", 0, 0, 30.0, 90.0]]
        if pipeline:
            bars = [[kind, rank, i, 20.0 * i + 10 * rank + late, 20.0 * i + 10 * rank + late + length]
                    for kind, late, length in (("F", 0.0, 8.0), ("B", 60.0, 16.0)) for i in range(3)]  # fmt: skip
        ranks.append({"rank": rank, "parts_ms": PARTS, "step_ms": sum(PARTS.values()), "comm": {}, "timeline": bars,
                      "memory": {"at_peak_mib": KINDS, "curve": [[0.0, 8.0], [50.0, 14.0]]}})  # fmt: skip
    (path / "samples" / f"step-{SAMPLED}.json").write_text(json.dumps({"step": SAMPLED, "ranks": ranks}))
