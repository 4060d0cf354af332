"""Try plants of the museum with spmd_types, a type system for tensors on several ranks: python -m tests.typed

It prints a table: what spmd_types says of each plant, and what the proof and the localiser say (from build/museum.jsonl,
which `python -m tests.museum` writes). spmd_types is no dependency of the lab: pip install --no-deps spmd_types==0.3.1
"""

import sys
import tempfile
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
    tried = [result for result in results.items() if result[0] not in alarms and not result[0].startswith("RIGHT")]
    print("| plant | where | spmd_types | the proof | the localiser |\n|---|---|---|---|---|")
    for name, result in tried:
        kind, bug = name.split()
        where = "the lab" if kind == "BUG" else "a program"
        print(f"| `{bug}` | {where} | {_verdict(result)} | {_proof(outcomes.get(bug))} |")
    for bug in OUT_OF_REACH:
        print(f"| `{bug}` | | cannot be written | {_proof(outcomes.get(bug))} |")
    caught = sum(bool(result["said"]) for _, result in tried)
    print(f"{len(tried) + len(OUT_OF_REACH)} plants, {len(OUT_OF_REACH)} cannot be written; {caught} caught by types")
    return 1 if alarms else 0


def _right(name: str, result: dict[str, Any]) -> bool:
    """Whether the right form has no type error, and the plant did act."""
    if "error" in result:
        return False
    if name.startswith("RIGHT"):
        return not result["said"]
    return result["acted"] or bool(result["said"]) and not result.get("right")


def _verdict(result: dict[str, Any]) -> str:
    if result["said"]:
        words = "caught by an assertion" if "assert_type" in result["line"] else "caught"
        return f"{words}, {result['line']}: {result['said'].splitlines()[0]}"
    if result.get("global") and not result["global_right"]:
        return f"caught by global types: {result['global'].splitlines()[0]}"
    return "not caught"


def _proof(outcome: Outcome | None) -> str:
    if outcome is None:
        return "not run | not run"
    said = outcome.finding and f"{outcome.finding['module']}, {outcome.finding['axis']}, {outcome.finding['kind']}"
    return f"{', '.join(outcome.red) or 'not caught'} | {said or 'nothing'}"


if __name__ == "__main__":
    sys.exit(main())
