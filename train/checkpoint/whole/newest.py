"""Which checkpoint a path names: that of a run, or one of them. Torch is not imported."""

from __future__ import annotations

from pathlib import Path

from train.checkpoint.folder import checkpoints_in
from train.checkpoint.manifest import Damaged, Manifest, wrong_files
from train.config.problems import BadInput, Problem


def checkpoints(path: Path) -> list[Path]:
    """The checkpoint itself, or those of a run from the newest to the oldest. Raises BadInput if there is none."""
    found = checkpoints_in(path)
    if not found:
        why = "" if path.is_dir() else ", as there is no such folder"
        if (path / "config.yaml").is_file():
            why = ", as its run had checkpoint.every=0, or was cut off before its first save"
        fix = "give the directory of a run, or one of its checkpoints/step-N"
        raise BadInput(Problem("no_checkpoint", f"{path} has no checkpoint{why}", fix))
    return found


def newest(path: Path) -> Path:
    """The newest checkpoint whose files are as they were written. Raises BadInput if there is none."""
    bad = []
    for one in checkpoints(path):
        wrong = problems(one)
        if not wrong:
            return one
        bad.append(f"{one}: {wrong[0]}")
    message = f"{path} has no good checkpoint: {'; '.join(bad)}"
    raise BadInput(Problem("checkpoint", message, "give another run, or another of its checkpoints"))


def problems(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, in sentences."""
    try:
        return wrong_files(folder, Manifest.read(folder))
    except Damaged as error:
        return [error.why]
