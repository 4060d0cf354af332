"""From where a run starts: from nothing, from its own checkpoint after it was cut off, or from another run's.

`checkpoint.resume=auto` looks for the newest run of the same command line (`run_dir.run_name`). If a process trains it,
the command is refused; if it was finished, or stopped by an error of its own, a new run starts; if it was cut off, it
goes on in its directory. A path starts a new run, which may have another layout, from that state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.checkpoint.changes import allowed_changes
from train.checkpoint.folder import CHECKPOINTS, complete, step_of
from train.checkpoint.manifest import Damaged, Manifest, wrong_files
from train.command.process.life import STOPPED, read_life, refuse_living
from train.config.problems import BadInput, Problem
from train.config.schema import Config
from train.ranks.elastic.carried import Carried
from train.ranks.side_group import SideGroup
from train.record.run_dir import runs_named

AUTO, NEVER = "auto", "never"


@dataclass(frozen=True)
class Start:
    """`checkpoint`: the folder and the manifest from which the run goes on; None: it starts at step 1. `run`: the
    directory in which it goes on; None: it gets a new one. `same_layout`: whether the checkpoint was saved on this
    layout. `said`: lines for the user. `carried`: what the ranks have in memory, from which they go on instead
    (`runtime.elastic`)."""

    checkpoint: Path | None = None
    manifest: Manifest | None = None
    run: Path | None = None
    same_layout: bool = False
    said: tuple[str, ...] = ()
    carried: Carried | None = None

    @property
    def step(self) -> int:
        """The last step that is done."""
        if self.carried is not None:
            return self.carried.step
        return self.manifest.step if self.manifest else 0


def find(
    config: Config,
    name: str,
    work: Callable[[], dict[str, Any]],
    layout: dict[str, Any],
    side_group: SideGroup,
    *,
    restarted: bool,
) -> Start:
    """Find the start of this run, and verify its checkpoint: each rank hashes a part of the files. Collective.

    `name`: the run's name without a number. `work`, `layout`: of this run, to compare with the checkpoint's. The work
    has the hash of the text, which is only made if there is something to compare.
    `restarted`: whether torchrun has started these ranks again, which always continues the run.
    Raises BadInput: the run is being trained, no checkpoint is good, or something else than allowed has changed.
    """
    found: dict[str, Any] = {}
    if side_group.world.rank == 0:  # an error ends this rank, and torchrun ends the others
        found = _own(config, name) if restarted or config.checkpoint.resume == AUTO else {}
        if not found and config.checkpoint.resume not in (AUTO, NEVER):
            found = _of_path(Path(config.checkpoint.resume).expanduser())
    found = side_group.share_json(found)
    if not found:
        return Start()
    now = side_group.share_json(work() if side_group.world.rank == 0 else None)
    bad: list[str] = []
    for path in map(Path, found["checkpoints"]):
        manifest = _verified(path, side_group, bad)
        if manifest is None:
            continue
        _check_step(config, path, manifest, own=found["own"])
        changed = allowed_changes(manifest.work, now)
        same = manifest.layout == layout
        run = Path(found["run"]) if found["own"] else None
        return Start(path, manifest, run, same, (*bad, _line(path, run, changed, same=same)))
    raise Damaged(Path(found["run"]), "; ".join(bad))


def _own(config: Config, name: str) -> dict[str, Any]:
    """The newest run with this name, if it was cut off and has checkpoints: {"own": true, "run": directory,
    "checkpoints": complete ones from the newest to the oldest}; else empty. Raises BadInput if a process trains it."""
    runs = runs_named(Path(config.metrics.dir), name)
    if not runs:
        return {}
    run = runs[-1][1]
    refuse_living(run)
    life, found = read_life(run), complete(run)
    ended = (run / "summary.json").exists() or (life is not None and life.state == STOPPED)
    return {"own": True, "run": str(run), "checkpoints": [*map(str, found)]} if found and not ended else {}


def _of_path(path: Path) -> dict[str, Any]:
    """The checkpoints of a path that was given: of a run, or one of them; as `_own`, but with "own": false."""
    if step_of(path) is not None and path.is_dir():
        return {"own": False, "run": str(path.parent.parent), "checkpoints": [str(path)]}
    found = complete(path)
    if not found:
        message = f"checkpoint.resume={path} has no checkpoint"
        fix = f"use the directory of a run with {CHECKPOINTS}/step-N in it, or such a folder, or auto or never"
        raise BadInput(Problem("resume", message, fix))
    return {"own": False, "run": str(path), "checkpoints": [str(one) for one in found]}


def _check_step(config: Config, path: Path, manifest: Manifest, *, own: bool) -> None:
    """Raise BadInput if nothing is left to train. A run that was cut off after its last step only ends."""
    steps = config.train.steps
    if manifest.step < steps or own:
        return
    message = f"train.steps={steps}, but {path} is the state after step {manifest.step}"
    raise BadInput(Problem("resume_steps", message, f"use train.steps={manifest.step + steps}, for example"))


def _verified(path: Path, side_group: SideGroup, bad: list[str]) -> Manifest | None:
    """The manifest of a checkpoint whose files are all as they were written; else None, and a line in `bad`."""
    wrong: list[str] = []
    manifest = None
    try:
        manifest = Manifest.read(path)
        wrong = wrong_files(path, manifest, side_group.world.rank, side_group.world.world_size)
    except Damaged as error:
        wrong = [error.why]
    said = [one for of_rank in side_group.exchange_json(wrong) for one in of_rank]
    if said:
        bad.append(f"{path} is not used: {said[0]}")
    return None if said else manifest


def _line(path: Path, run: Path | None, changed: list[str], *, same: bool) -> str:
    head = f"continuing {run} after step {step_of(path)}" if run else f"starting from {path}"
    more = [] if same else ["on another layout, so that dropout and compressed communication begin anew"]
    more += [f"with {', '.join(changed)}"] if changed else []
    return ", ".join([head, *more])
