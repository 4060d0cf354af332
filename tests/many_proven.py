"""Prove hundreds of drawn configs, all of which are right, and search each for something wrong. Nothing may be found.

    python -m tests.many_proven [number=200] [chunks=N] [--write]

Each config, of 2 to 8 ranks, is compared with one device, and the localiser is asked where it goes wrong. So whatever
is called wrong is a false alarm, or a bug. Each result is a line of build/many_proven.jsonl, so that an interrupted run
can be continued; a line of another commit is kept too. `chunks`: end after so many worlds. `--write` runs nothing, and
writes docs/proven-products.md. The exit code is 1 if there was a false alarm, or a config that could not be run.
"""

import json
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from scripts.verifying.report import Answer, share_of_bound
from tests.drawn import Drawn
from tests.proven import configs, row_of, with_deepspeed
from tests.running import run_rows
from train.command.resources import source_commit

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "build" / "many_proven.jsonl"
CHUNK = 10  # configs a world
REASON = 20_000  # characters of a traceback that are kept: its first lines name the cause


@dataclass(frozen=True)
class Proven:
    """A drawn config with what the proof and the localiser say. `share`: the error of the worst column relative to its
    bound. `finding`: the sentence of the localiser; empty if it finds nothing. `reason`: why there is no verdict.
    `seconds`: of the run on all ranks, and of the search in it."""

    overrides: tuple[str, ...]
    world_size: int
    answer: Answer
    column: str = ""
    share: float = 0.0
    finding: str = ""
    reason: str = ""
    seconds: float = 0.0
    commit: str = ""
    torch: str = ""

    @property
    def drawn(self) -> Drawn:
        return Drawn(self.overrides, self.world_size)

    @property
    def precision(self) -> str:
        return self.drawn.plan.config.precision.value


def main(words: Sequence[str]) -> int:
    options = dict(word.split("=") for word in words if "=" in word)
    wanted = configs(int(options.get("number", 200)))
    done = read(wanted)
    if "--write" in words:
        from tests.proven_page import page

        (ROOT / "docs" / "proven-products.md").write_text(page(done))
        return 0
    have = {proven.drawn for proven in done}
    chunks = chunked([one for one in wanted if one not in have])
    for chunk in chunks[: int(options.get("chunks", len(chunks)))]:
        for proven in run(chunk):
            print(line_of(proven), flush=True)
    done = read(wanted)
    print(counts(done, len(wanted)))
    return 1 if any(is_alarm(one) or one.answer is Answer.not_run for one in done) else 0


def is_alarm(one: Proven) -> bool:
    return one.answer is Answer.differs or bool(one.finding)


def read(wanted: Sequence[Drawn]) -> list[Proven]:
    """The last results of those of the configs that have one, in the order of the configs."""
    lines = map(json.loads, FILE.read_text().splitlines()) if FILE.exists() else ()
    last = {one.drawn: one for one in map(restored, lines)}
    return [last[one] for one in wanted if one in last]


def restored(line: dict[str, Any]) -> Proven:
    return Proven(**line | {"overrides": tuple(line["overrides"]), "answer": Answer(line["answer"])})


def chunked(configs: Sequence[Drawn]) -> list[list[Drawn]]:
    """Configs that one world can run, CHUNK at a time."""

    def world(one: Drawn) -> tuple[bool, int]:
        return with_deepspeed(one), one.world_size

    groups = [[*same] for _, same in groupby(sorted(configs, key=world), key=world)]
    return [group[start : start + CHUNK] for group in groups for start in range(0, len(group), CHUNK)]


def run(chunk: Sequence[Drawn]) -> Iterator[Proven]:
    """Run the configs, and append a line for each."""
    import torch

    commit = source_commit()
    results = results_of(chunk)
    FILE.parent.mkdir(exist_ok=True)
    with FILE.open("a") as file:
        for one in chunk:
            proven = judged(one, results[one], commit, torch.__version__)
            file.write(json.dumps(asdict(proven) | {"answer": proven.answer.value}) + "\n")
            yield proven


def results_of(chunk: Sequence[Drawn]) -> dict[Drawn, dict[str, Any]]:
    """If something raises outside the world, such as the localiser, the configs are run one by one to see which."""
    rows = {one: row_of(one) for one in chunk}
    with tempfile.TemporaryDirectory(prefix="proven-") as folder:
        try:
            results = run_rows(Path(folder) / "rows", [*rows.values()], traced=True)
        except Exception:
            if len(chunk) == 1:
                return {chunk[0]: {"error": traceback.format_exc()}}
            return {one: result for alone in chunk for one, result in results_of([alone]).items()}
    return {one: results[row.name] for one, row in rows.items()}


def judged(one: Drawn, result: dict[str, Any], commit: str, torch: str) -> Proven:
    from train.proof.comparison import Verdict

    for key, answer in (("error", Answer.not_run), ("unjudged", Answer.unjudged)):
        if key in result:
            reason = result[key][-REASON:]
            return Proven(one.overrides, one.world_size, answer, reason=reason, commit=commit, torch=torch)
    verdicts = [Verdict(*values) for values in result["verdicts"]]
    worst = max(verdicts, key=lambda verdict: (not verdict.ok, share_of_bound(verdict)))
    return Proven(
        one.overrides,
        one.world_size,
        Answer.equals if worst.ok else Answer.differs,
        column=f"{worst.column} {worst.name}",
        share=share_of_bound(worst),
        finding="" if result["finding"] is None else result["finding"].sentence(),
        seconds=round(result["seconds"] + result["locating_seconds"], 1),
        commit=commit,
        torch=torch,
    )


def line_of(one: Proven) -> str:
    said = f"{one.column} {one.share:.1e} of its bound" if one.column else one.reason
    found = f"; {one.finding}" if one.finding else ""
    return f"{one.answer.value}: {' '.join(one.overrides)} nproc={one.world_size}: {said}{found} ({one.seconds} s)"


def counts(done: Sequence[Proven], number: int) -> str:
    """How many there are of each answer, by precision and by size, and the reasons of those that were not judged."""
    lines = [f"{len(done)} of {number} configs were run:"]
    for title, some in groups(done).items():
        found = ", ".join(f"{answer.value} {n}" for answer in Answer if (n := sum(o.answer is answer for o in some)))
        lines.append(f"  {title}: {found}; localiser's false alarms: {sum(bool(one.finding) for one in some)}")
    return "\n".join([*lines, *(line_of(one) for one in done if is_alarm(one) or not one.column)])


def groups(done: Sequence[Proven]) -> dict[str, list[Proven]]:
    titles = {f"{size} ranks": [one for one in done if one.world_size == size] for size in range(2, 9)}
    for one in done:
        titles.setdefault(one.precision, []).append(one)
    return {"all": [*done]} | {title: some for title, some in titles.items() if some}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
