"""From where a run starts: from nothing, from its own checkpoint after it was cut off, or from another run's.

`checkpoint.resume=auto` looks for the newest run of the same command line (`run_dir.run_name`). If a process trains it,
the command is refused; if it was finished, or stopped by an error of its own, a new run starts; if it was cut off, it
goes on in its directory. A path starts a new run, which may have another layout, from that state, and the same line
continues this new run after it was cut off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.checkpoint.changes import allowed_changes
from train.checkpoint.folder import CHECKPOINTS, checkpoints_in, complete, ended, step_of
from train.checkpoint.manifest import Damaged, Manifest, wrong_files
from train.checkpoint.weights import Weights
from train.command.planning import auto
from train.command.planning.search.layouts import MICRO, RECOMPUTE
from train.command.process.life import read_life, refuse_living
from train.config.groups.run import AUTO, NEVER
from train.config.problems import BadInput, Problem
from train.config.rules.idle import written
from train.config.schema import Config
from train.config.world import World
from train.measure.hardware import device_name
from train.ranks.distributed import choose_runtime
from train.ranks.elastic.carried import Carried
from train.ranks.side_group import SideGroup
from train.record.run_dir import command, runs_named
from train.record.run_files import Unreadable
from train.record.run_folder import read_config, read_facts


@dataclass(frozen=True)
class Start:
    """`checkpoint`: the folder and the manifest from which the run goes on; None: it starts at step 1. `run`: the
    directory in which it goes on; None: it gets a new one. `layout`: of this run. `same_layout`: whether the checkpoint
    was saved on it. `said`: lines for the user. `carried`: what the ranks have in memory, from which they go on instead
    (`runtime.elastic`). `weights`: the initial parameters of a run that starts at step 1. `given`: the hashes of what
    the run is given beside its text."""

    checkpoint: Path | None = None
    manifest: Manifest | None = None
    run: Path | None = None
    layout: dict[str, Any] = field(default_factory=dict)
    same_layout: bool = False
    said: tuple[str, ...] = ()
    carried: Carried | None = None
    weights: Weights | None = None
    given: dict[str, str] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """The last step that is done."""
        if self.carried is not None:
            return self.carried.step
        return self.manifest.step if self.manifest else 0


def find(
    config: Config, name: str, work: Callable[[], dict[str, Any]], layout: dict[str, Any], side_group: SideGroup
) -> Start:
    """Find the start of this run, and verify its checkpoint: each rank hashes a part of the files. Collective.

    `name`: the run's name without a number. `work`, `layout`: of this run, to compare with the checkpoint's. The work
    has the hash of the text, which is only made if there is something to compare.
    Raises BadInput: the run is being trained, it was stopped and torchrun starts it again, no checkpoint is good, or
    something else than allowed has changed. Raises SystemExit if torchrun starts a run again that is finished.
    """
    found: dict[str, Any] = {}
    if side_group.world.rank == 0:  # an error ends this rank, and torchrun ends the others
        found = _own(config, name, side_group.world)
        if not found and config.checkpoint.resume not in (AUTO, NEVER):
            found = _of_path(Path(config.checkpoint.resume).expanduser())
    found = side_group.share_json(found)
    if not found:
        return Start(layout=layout)
    if "finished" in found:  # a rank failed after the run was complete
        if side_group.world.rank == 0:
            print(f"{found['finished']} is finished", flush=True)
        raise SystemExit(0)
    if not found["checkpoints"]:
        run = Path(found["run"])
        return Start(run=run, layout=layout, said=(f"{run} begins again, as it has no checkpoint",))
    now = side_group.share_json(work() if side_group.world.rank == 0 else None)
    bad: list[str] = []
    for path in map(Path, found["checkpoints"]):
        manifest = _verified(path, side_group, bad)
        if manifest is None:
            continue
        _check_step(config, path, manifest, own=found["own"])
        changed = allowed_changes(manifest.work, now)
        same = manifest.layout == layout
        run_dir = Path(found["run"]) if found["own"] else None
        said = (*bad, _line(path, run_dir, changed, same=same))
        return Start(path, manifest, run_dir, layout=layout, same_layout=same, said=said)
    message = f"{found['run']} has no good checkpoint: {'; '.join(bad)}"
    raise BadInput(Problem("checkpoint", message, "use checkpoint.resume=never to start a new run"))


def _own(config: Config, name: str, world: World) -> dict[str, Any]:
    """The run with this name that goes on: {"own": true, "run": directory, "checkpoints": complete ones from the newest
    to the oldest}; empty if there is none; {"finished": directory} if it is complete.

    If torchrun has started the ranks again, that is the run of the first start, even if it has no checkpoint. Else it
    is the newest run, if it was cut off and has checkpoints. Raises BadInput if a process trains it, or if the run of
    the first start has ended by itself.
    """
    runs = [path for _, path in runs_named(Path(config.metrics.dir), name)]
    if world.restarts_done:
        started = [path for path in runs if (life := read_life(path)) is not None and life.launch == world.launch]
        if started:
            run = started[-1]
            if (run / "summary.json").exists():
                return {"finished": str(run)}
            if how := ended(run):
                fix = "a restart has nothing to do; the same command line starts a new run"
                raise BadInput(Problem("ended", f"{run} {how}", fix))
            return {"own": True, "run": str(run), "checkpoints": [*map(str, complete(run))]}
    if config.checkpoint.resume == NEVER or not runs:
        return {}
    run = runs[-1]
    refuse_living(run)
    found = complete(run)
    return {"own": True, "run": str(run), "checkpoints": [*map(str, found)]} if found and not ended(run) else {}


def _of_path(path: Path) -> dict[str, Any]:
    """The checkpoints of a path that was given: of a run, or one of them; as `_own`, but with "own": false."""
    found = checkpoints_in(path)
    if not found:
        message = f"checkpoint.resume={path} has no checkpoint"
        fix = f"use the directory of a run with {CHECKPOINTS}/step-N in it, or such a folder, or auto or never"
        raise BadInput(Problem("resume", message, fix))
    return {"own": False, "run": str(path), "checkpoints": [*map(str, found)]}


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


def planned(words: Sequence[str], world: World) -> list[str]:
    """The command line with a layout in place of `strategy=auto`: that of the run that goes on, so that its checkpoint
    fits, else the planner's. Rank 0 says which; its keeper (`runtime.elastic`) does not. Raises BadInput if no layout
    fits."""
    if auto.asks_for_help(words):
        return auto.stood_in(words)
    config = auto.standing(words)
    stored = _stored_layout(config, world)
    if stored is None:
        device = device_name(choose_runtime(config.runtime, world).device)
        choice = auto.choose(words, world.world_size, device)
    else:
        run, layout = stored
        choice = auto.Choice(tuple(layout), (f"{auto.WORD} keeps the layout of {run}, which goes on",))
    if world.rank == 0 and not (config.runtime.elastic and world.roll is None):
        print("\n".join(choice.lines), flush=True)
    return auto.in_place(words, choice.words)


def _stored_layout(config: Config, world: World) -> tuple[Path, list[str]] | None:
    """The newest run of this command line that goes on, and the words of its layout. A restart by torchrun goes on with
    the run of the first start, whatever became of it."""
    found = []
    for path in Path(config.metrics.dir).glob("*/work.json"):
        run, life = path.parent, read_life(path.parent)
        restarted = world.restarts_done > 0 and life is not None and life.launch == world.launch
        goes_on = config.checkpoint.resume == AUTO and complete(run) and not ended(run)
        try:
            if (restarted or goes_on) and read_facts(path).get("command") == command(world):
                found.append((path.stat().st_mtime, run, read_config(run)))
        except (OSError, Unreadable):
            continue
    if not found:
        return None
    _, run, values = max(found, key=lambda one: one[0])
    keys = [key for key in values if key.startswith("strategy.") or key in (MICRO, RECOMPUTE)]
    preset = "pp" if "strategy.schedule" in values else "single"
    return run, [f"strategy={preset}", *(f"{key}={written(values[key])}" for key in keys)]
