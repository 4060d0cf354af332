"""Print the time of a GPU's kernels by kind: python -m scripts.benching.kernels runs/FOLDER …

It reads the last trace of rank 0 of each run, which `metrics.trace=true` keeps, and prints a table with one column for
each run: milliseconds of a recorded step by kind, the time in which a message hid behind other kernels, and the time in
which the GPU had nothing to do. Recording makes gaps longer; kernels take as long as in any step. Kinds whose kernels
run at the same time add up to more than the step.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.command.process.exits import reported_once
from train.config.problems import BadInput, Problem
from train.config.world import World
from train.model.spans import Interval, length, union

# The first kind whose expression is found in a kernel's name is its kind.
KINDS: Mapping[str, str] = {
    "messages": r"^nccl",
    "attention": r"flash|fmha|sdpa|attention",
    "matrix products": r"gemm|nvjet|cutlass|cublas|_mm_|splitK",
    "optimiser": r"adam",
    "clipping": r"lpnorm|Norm.*multi_tensor|multi_tensor.*(Norm|BinaryOpScalarTensor)",
    "loss": r"softmax|nll|cross_entropy",
    "norms and elementwise": r"^triton|rms_norm|layer_norm",
    "copies, casts and fills": r"memcpy|memset|copy|CatArray|chunk_cat|split_with_sizes|fill",
    "sums and elementwise, eager": r"elementwise|reduce|index|scatter|gather|sort|scan|multi_tensor",
}
OTHER, HIDDEN, IDLE, STEP = "other kernels", "of messages, hidden", "no kernel", "first to last kernel"
ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}


def kind_of(name: str) -> str:
    return next((kind for kind, words in KINDS.items() if re.search(words, name, re.IGNORECASE)), OTHER)


def by_kind(events: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Milliseconds by kind of the events of a Chrome trace, from its first kernel to its last. Raises BadInput if there
    is none."""
    times: dict[str, list[Interval]] = {kind: [] for kind in (*KINDS, OTHER)}
    for event in events:
        if event.get("cat") in ON_DEVICE:
            start = event["ts"] / 1e3
            times[kind_of(event["name"])].append((start, start + event["dur"] / 1e3))
    if not any(times.values()):
        raise BadInput(Problem("run", "its trace has no kernels of a GPU", "name runs that were made on a GPU"))
    busy = {kind: length(union(spans)) for kind, spans in times.items()}
    every = union([span for spans in times.values() for span in spans])
    work = length(union([span for kind, spans in times.items() if kind != "messages" for span in spans]))
    step = every[-1][1] - every[0][0]
    return busy | {HIDDEN: busy["messages"] - (length(every) - work), IDLE: step - length(every), STEP: step}


def last_trace(run: Path) -> Sequence[Mapping[str, Any]]:
    """The events of rank 0 in the last recorded step of a run. Raises BadInput if there are none."""
    found = {int(path.name.split("-")[1]): path for path in run.glob("**/step-*-rank-0.json.gz")}
    if not found:
        raise BadInput(Problem("run", f"{run} has no trace", "train with metrics.trace=true metrics.profile_every=10"))
    path = found[max(found)]
    try:
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        if not isinstance(events, list):
            raise ValueError("traceEvents is no list")
    except (OSError, EOFError, ValueError, KeyError, TypeError, zlib.error) as error:
        raise BadInput(Problem("run", f"{path} cannot be read: {error}", "record it again")) from error
    return events


def lines(runs: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The table in Markdown; kinds that no run has are left out."""
    rows = [f"| ms | {' | '.join(runs)} |", "|---" * (len(runs) + 1) + "|"]
    for kind in (*KINDS, OTHER, HIDDEN, IDLE, STEP):
        if any(times[kind] > 0.005 for times in runs.values()):
            rows.append(f"| {kind} | {' | '.join(f'{times[kind]:,.1f}' for times in runs.values())} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs that have traces")
    with reported_once(World.single(), trains=False):
        runs = parser.parse_args().runs
        print("\n".join(lines({str(run): by_kind(last_trace(run)) for run in runs})))


if __name__ == "__main__":
    main()
