"""Loss curves of several runs over one another, and how far each is from the first.

    python scripts/curves.py OUT.png RUN RUN...

For runs of the same work (model, data, seed, batch): the distance is what the order of summation does to it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

FLOOR = 1e-8  # below it a float32 loss cannot differ: shown as no difference


def losses(run: Path) -> tuple[str, dict[int, float]]:
    """(strategy and processes, training loss by step)."""
    summary = json.loads((run / "summary.json").read_text())
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    values = {record["step"]: record["train/loss"] for record in records if "train/loss" in record}
    return f"{summary['strategy']}, {summary['world_size']} process(es)", values


def main() -> None:
    target, *runs = map(Path, sys.argv[1:])
    (first, reference), *others = [losses(run) for run in runs]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    curves, distances = figure.subplots(1, 2)
    curves.plot(reference.keys(), reference.values(), label=first, linewidth=3, color="0.7")
    for name, values in others:
        curves.plot(values.keys(), values.values(), label=name, linewidth=0.8)
        apart = [max(abs(loss - reference[step]), FLOOR) for step, loss in values.items()]
        distances.plot(values.keys(), apart, linewidth=0.8)
        print(f"{name}: at most {max(apart):.1e} from {first} in {len(values)} steps")
    curves.set(xlabel="step", ylabel="training loss")
    curves.legend(fontsize=7)
    distances.set(xlabel="step", ylabel=f"distance from {first.partition(',')[0]}", yscale="log", ylim=(FLOOR, 1e-4))
    figure.savefig(target, dpi=90)


if __name__ == "__main__":
    main()
