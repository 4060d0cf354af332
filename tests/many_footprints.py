"""Compare the closed form of memory with dry runs of every preset and of hundreds of drawn layouts.

    python -m tests.many_footprints [number=200] [chunks=N]

Of each layout the fullest rank runs with fake tensors (tests/footprint_worker.py). Each result is a line of
build/many_footprints.jsonl, so that an interrupted run can be continued. `chunks`: end after so many processes. The
exit code is 1 if a peak, or a kind of more than 5 % of it, is off by more than 3 %.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from tests.drawn import Drawn
from tests.footprints import Compared, compared, dry_runs, fullest, layouts, presets

FILE = Path("build") / "many_footprints.jsonl"
CHUNK = 8  # layouts a process
BOUND = 0.03


def main(words: Sequence[str]) -> int:
    options = dict(word.split("=") for word in words)
    wanted = [*presets(), *drawn(int(options.get("number", 200)))]
    done = read()
    left = [one for one in wanted if one not in done]
    FILE.parent.mkdir(exist_ok=True)
    chunks = [left[start : start + CHUNK] for start in range(0, len(left), CHUNK)]
    for chunk in chunks[: int(options.get("chunks", len(chunks)))]:
        jobs = [(one, fullest(one)) for one in chunk]
        with FILE.open("a") as file:
            for result in dry_runs(jobs, timeout_s=1200):
                file.write(json.dumps(result) + "\n")
        print(f"{len(read())}/{len(wanted)}", flush=True)
    return report([one for one in wanted if one in read()], read())


def drawn(number: int) -> list[Drawn]:
    """The drawn layouts. Drawing takes half a minute, so they are kept beside the results."""
    file = FILE.with_name(f"footprints_{number}.json")
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps([(one.overrides, one.world_size) for one in layouts(number)]))
    return [Drawn(tuple(words), size) for words, size in json.loads(file.read_text())]


def read() -> dict[Drawn, dict]:
    lines = map(json.loads, FILE.read_text().splitlines()) if FILE.exists() else ()
    return {Drawn(tuple(line["overrides"]), line["world_size"]): line for line in lines}


def report(ran: Sequence[Drawn], results: dict[Drawn, dict]) -> int:
    worst: dict[str, list[tuple[Compared, Drawn]]] = defaultdict(list)
    failed = 0
    for one in ran:
        line = results[one]
        if "error" in line:
            print("raised:", *one.overrides, f"nproc={one.world_size}", line["error"][-600:], sep="\n")
            failed += 1
            continue
        result = compared(one, line["rank"], line["kinds"])
        worst[one.overrides[0]].append((result, one))
        if max(abs(result.error), abs(result.worst_kind[0])) > BOUND:
            failed += 1
            print(f"{percent(result.error)} {result.worst_kind[1]} {percent(result.worst_kind[0])}:",
                  *one.overrides, f"nproc={one.world_size} rank={line['rank']}", kinds_of(result))  # fmt: skip
    for name, found in sorted(worst.items()):
        total = max((result.error for result, _ in found), key=abs)
        kind = max((result.worst_kind for result, _ in found), key=lambda pair: abs(pair[0]))
        print(f"{name}: {len(found)} layouts, peak within {percent(total)}, kinds {percent(kind[0])} ({kind[1]})")
    print(f"{len(ran)} layouts, {failed} beyond {BOUND:.0%}")
    return 1 if failed else 0


def percent(share: float) -> str:
    return f"{100 * share:+.2f} %"


def kinds_of(result: Compared) -> str:
    names = sorted({*result.said.kinds, *result.measured})
    return " ".join(
        f"{name}={result.said.kinds.get(name, 0) / 2**20:.0f}/{result.measured.get(name, 0) / 2**20:.0f}"
        for name in names
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
