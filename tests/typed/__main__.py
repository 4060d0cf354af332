"""Try plants of the museum with spmd_types, a type system for tensors on several ranks: python -m tests.typed

It prints a table of what spmd_types says of each plant, and what the proof and the localiser say, which is read from
build/museum.jsonl (`python -m tests.museum` writes it). Where spmd_types is not installed, it says so and ends.
"""

import sys
import tempfile
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tests.museum.exhibits import EXHIBITS
from tests.museum.running import Outcome, read
from tests.rows.base import BASE, F64
from tests.running import job, run_jobs

# tried in the lab's own code, where the museum plants them; each is on two ranks
IN_THE_LAB = (
    "norm_gradient_not_summed",
    "final_norm_gradient_not_summed",
    "shared_head_gradient_not_summed",
    "head_input_gradient_not_summed",
    "gradient_summed_again",
    "router_gradient_not_summed",
    "gathered_gradient_sliced",
    "parallel_loss_of_gathered_logits",
    "maximum_of_own_shard",
    "gradient_only_where_the_target_is",
    "ids_of_other_ranks_not_zeroed",
    "tensor_ranks_read_other_rows",
    "norm_gradients_averaged",
)
OUT_OF_REACH = ("ring_backward_with_own_keys", "gradient_of_another_microbatch_sent")  # no sending from rank to rank


def main() -> int:
    try:
        found = version("spmd_types")
    except PackageNotFoundError:
        print("skipped: spmd_types is not installed (pip install --no-deps spmd_types==0.3.1)")
        return 0
    from tests.typed.programs import PROGRAMS  # it imports spmd_types

    rows = {exhibit.bug: exhibit.row for exhibit in EXHIBITS}
    axes = {exhibit.bug: exhibit.axis for exhibit in EXHIBITS}
    right = {rows[bug].strategy + rows[bug].options: rows[bug].overrides for bug in IN_THE_LAB}
    jobs = [
        *(job(f"RIGHT {' '.join(words)}", overrides) for words, overrides in right.items()),
        *(job(f"BUG {bug}", rows[bug].overrides) for bug in IN_THE_LAB),
        *(job(f"PROGRAM {bug}", [*BASE, "strategy=tp", F64]) for bug in PROGRAMS),
    ]
    with tempfile.TemporaryDirectory(prefix="typed-") as folder:
        results = run_jobs(Path(folder) / "world", jobs, size=2, worker="tests.typed.worker")
    print(f"spmd_types {found}")
    alarms = [name for name, result in results.items() if not _right(name, result)]
    for name in alarms:
        print(f"NOT USABLE {name}: {results[name].get('error') or results[name].get('said') or results[name]}")
    outcomes = read(EXHIBITS)
    tried = {name: result for name, result in results.items() if name not in alarms and not name.startswith("RIGHT")}
    print("| plant | axis | tried in | spmd_types | the proof: columns | the localiser |\n|---|---|---|---|---|---|")
    for name, result in tried.items():
        kind, bug = name.split()
        where = "the lab" if kind == "BUG" else "a program"
        print(f"| `{bug}` | {axes[bug]} | {where} | {_verdict(result)} | {_proof(outcomes.get(bug))} |")
    for bug in OUT_OF_REACH:
        print(f"| `{bug}` | {axes[bug]} | | cannot be written | {_proof(outcomes.get(bug))} |")
    verdicts = Counter(_verdict(result).partition(",")[0] for result in tried.values())
    print(f"{len(tried) + len(OUT_OF_REACH)} plants; cannot be written: {len(OUT_OF_REACH)}")
    print("; ".join(f"{words}: {count}" for words, count in sorted(verdicts.items())))
    for name, result in tried.items():
        if message := result["said"] or (not result.get("global_right") and result.get("global")):
            print(f"{name}: {result['line']}\n    {message.splitlines()[0]}")
    return 1 if alarms else 0


def _right(name: str, result: dict[str, Any]) -> bool:
    """Whether the right form has no type error, and the plant did act."""
    if "error" in result:
        return False
    if name.startswith("RIGHT"):
        return not result["said"]
    return result["acted"] and not result.get("right")


def _verdict(result: dict[str, Any]) -> str:
    if result["said"]:
        words = "caught by an assertion" if "assert_type" in result["line"] else "caught"
        return f"{words}, {result['line'].split()[0]}"
    if result.get("global") and not result["global_right"]:
        return "caught by global types"
    return "not caught"


def _proof(outcome: Outcome | None) -> str:
    if outcome is None:
        return "not run | not run"
    said = outcome.finding and f"{outcome.finding['module']}, {outcome.finding['axis']}, {outcome.finding['kind']}"
    return f"{', '.join(outcome.red) or 'not caught'} | {said or 'nothing'}"


if __name__ == "__main__":
    sys.exit(main())
