"""Runs exhibits in worlds of processes, and keeps one line of JSON for each, so that a run can go on after a break."""

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from tests.museum.base import Exhibit
from tests.running import run_rows
from train.command.resources import source_commit
from train.proof.comparison import Verdict
from train.proof.locating.finding import Finding

ROOT = Path(__file__).resolve().parents[2]
LINES = ROOT / "build" / "museum.jsonl"
ROWS_AT_ONCE = 8  # in one world: as many results are lost if the run is stopped


@dataclass(frozen=True)
class Outcome:
    """What the proof said about an exhibit. `finding`: what the localiser said, or None if it did not run."""

    exhibit: Exhibit
    commit: str
    torch: str
    seconds: float
    patched_calls: int
    verdicts: tuple[Verdict, ...]
    finding: dict[str, Any] | None
    problem: str  # why there are no verdicts

    @property
    def red(self) -> dict[str, Verdict]:
        return {verdict.column: verdict for verdict in self.verdicts if not verdict.ok}

    @property
    def caught(self) -> bool:
        """A bug whose line never ran was not planted, so nothing was proven."""
        return self.patched_calls > 0 and bool(self.red)

    @property
    def place_found(self) -> bool:
        return self.finds(self.exhibit.module, self.exhibit.axis)

    def finds(self, module: str, axis: str) -> bool:
        if self.finding is None:
            return False
        found, _, _ = self.finding["module"].partition(":")  # after it stands the name of an input of the module
        return (found, self.finding["axis"]) == (module, axis)

    @property
    def kind_found(self) -> bool:
        return self.names(self.exhibit.kind)

    def names(self, kind: str) -> bool:
        return self.finding is not None and self.finding["kind"] == kind


def world(exhibit: Exhibit) -> tuple[bool, int]:
    """DeepSpeed changes the state of a process, so its exhibits have worlds of their own."""
    return exhibit.row.strategy[0].startswith("strategy=ds_"), exhibit.row.size


def run(exhibits: Sequence[Exhibit], lines: Path = LINES) -> Iterator[Outcome]:
    """Run the exhibits, world by world, and append a line for each."""
    import torch

    commit = source_commit()
    lines.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="museum-") as folder:
        for number, group in enumerate(_groups(exhibits)):
            results = run_rows(Path(folder) / str(number), [exhibit.row for exhibit in group], traced=True)
            with lines.open("a") as file:
                for exhibit in group:
                    about = {"exhibit": exhibit.row.name, "commit": commit, "torch": torch.__version__}
                    line = about | results[exhibit.row.name] | {"finding": said(results[exhibit.row.name])}
                    file.write(json.dumps(line) + "\n")
                    yield outcome(exhibit, line)


def read(exhibits: Sequence[Exhibit], lines: Path = LINES) -> dict[str, Outcome]:
    """The last outcome of each exhibit that has one, by the name of its bug."""
    if not lines.exists():
        return {}
    found = {line["exhibit"]: line for line in map(json.loads, lines.read_text().splitlines())}
    return {e.bug: outcome(e, found[e.row.name]) for e in exhibits if e.row.name in found}


def outcome(exhibit: Exhibit, line: dict[str, Any]) -> Outcome:
    return Outcome(
        exhibit,
        line["commit"],
        line["torch"],
        line.get("seconds", 0.0),
        line.get("patched_calls", 0),
        tuple(Verdict(*values) for values in line.get("verdicts", ())),
        line.get("finding"),
        line.get("error") or line.get("unjudged") or "",
    )


def said(result: dict[str, Any]) -> dict[str, Any] | None:
    """What the localiser says of a result. `seconds`: of the traced run and of the search in it."""
    finding: Finding | None = result.get("finding")
    if finding is None:
        return None
    return {
        "module": finding.module,
        "axis": " or ".join(finding.guess.axes),
        "kind": finding.guess.kind.value,
        "sentence": finding.sentence(),
        "seconds": result["seconds"] + result["locating_seconds"],
    }


def _groups(exhibits: Iterable[Exhibit]) -> Iterator[list[Exhibit]]:
    for _, same in groupby(sorted(exhibits, key=world), key=world):
        group = list(same)
        for start in range(0, len(group), ROWS_AT_ONCE):
            yield group[start : start + ROWS_AT_ONCE]
