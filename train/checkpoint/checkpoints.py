"""The checkpoints of a run, as the training loop sees them: where it starts, what is due after a step, and leaving."""

from __future__ import annotations

import math
import signal
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from train.checkpoint.folder import Folder, check_space, shown_bytes
from train.checkpoint.resume import Start, find
from train.checkpoint.saver import Facts, Saver
from train.checkpoint.state import layout, restore
from train.checkpoint.weights import find_weights
from train.checkpoint.whole.trained import Trained
from train.command.process.life import SAVED
from train.command.process.signals import Signals
from train.config.problems import EXIT_SAVED, BadInput, Problem, Reported, writable
from train.config.schema import Config, OnNonfinite, Optimiser, Precision, SaveMode
from train.config.strategy import SavesState, TrainStep, resolve_degrees
from train.data.corpus import Corpus
from train.measure.metrics import Metrics
from train.ranks.batches import Batches
from train.ranks.elastic.carried import Carried
from train.ranks.side_group import SideGroup
from train.record.report import Report
from train.record.run_dir import config_sha256, run_name, work
from train.record.run_files import GIVEN


def start_of(
    config: Config,
    tree: DictConfig,
    corpus: Corpus,
    num_parameters: int,
    side_group: SideGroup,
    device: str,
    train_step: TrainStep,
    carried: Carried | None = None,
    teacher: Trained | None = None,
) -> Start:
    """From where the run starts. `device`: the type of the ranks' devices. `carried`: what the ranks have in memory,
    from which they then go on. Collective. Raises BadInput as `resume.find`, `find_weights` and `check_space` do."""
    world = side_group.world
    place = layout(config, world.world_size, device)
    if carried is not None:
        return Start(run=Path(carried.report["run"]), layout=place, carried=carried)
    name = run_name(config, tree, resolve_degrees(config.strategy.mesh_axes(), world.world_size), world.world_size)
    start = find(config, name, lambda: work(config, corpus.sha256), place, side_group)
    start = with_given(start, config, teacher, side_group)
    if config.checkpoint.every == 0 or world.rank > 0 or not isinstance(train_step, SavesState):
        return start
    size, root = state_bytes(config, num_parameters, world.world_size), Path(config.metrics.dir)
    saves = math.ceil(config.train.steps / config.checkpoint.every)
    with writable(root):
        root.mkdir(parents=True, exist_ok=True)
        # one more than are kept, as the oldest is removed when the newest has been verified
        check_space(root, size, min(config.checkpoint.keep + 1, saves), start.run)
    limits = f"no rank may need longer than runtime.timeout_s={config.runtime.timeout_s:g} s to write its part"
    if device == "cuda" and config.checkpoint.mode is not SaveMode.sync:
        limits += ", whose copy pins up to twice its size in the host's memory"
    return replace(start, said=(*start.said, f"a checkpoint has {shown_bytes(size)}; {limits}"))


def with_given(start: Start, config: Config, teacher: Trained | None, side_group: SideGroup) -> Start:
    """The start with what the run is given beside its text: its teacher, and the initial parameters if it starts at
    step 1. A run that goes on in its directory keeps the hash of those from which it has started, and must have the
    same teacher. Collective. Raises BadInput."""
    given = {} if teacher is None else {"teacher_sha256": teacher.sha256}
    if start.checkpoint is not None and start.manifest is not None:
        before = start.manifest.work.get(GIVEN, {}) if start.run else {}
        if teacher is not None and start.run and before.get("teacher_sha256") != teacher.sha256:
            message = f"{start.run} had another teacher than {teacher.folder}"
            raise BadInput(Problem("teacher", message, "use the same train.teacher, or checkpoint.resume=never"))
        kept = {name: before[name] for name in ("weights_sha256",) if name in before}
        return replace(start, given=given | kept)
    weights = find_weights(config, side_group)
    if weights is None:
        return replace(start, given=given)
    said = f"starting with the weights of {weights.folder} (SHA-256 {weights.sha256[:12]}…)"
    given |= {"weights_sha256": weights.sha256}
    return replace(start, weights=weights, given=given, said=(*start.said, said))


def state_bytes(config: Config, num_parameters: int, world_size: int) -> int:
    """The size of a checkpoint's numbers: weights, what the optimiser keeps for each, and what each rank saves for
    itself: errors of compression, and the codes of moments in 8 bits."""
    kept = int(config.optim.momentum > 0) if config.optim.name is Optimiser.sgd else 2
    degrees = resolve_degrees(config.strategy.mesh_axes(), world_size)
    errors = world_size // degrees["pp"] if config.strategy.keeps_errors() else 0
    size = num_parameters * (1 + kept + errors) * (8 if config.precision is Precision.float64 else 4)
    if config.optim.name is Optimiser.adamw8bit:  # each rank saves its codes too
        shards = degrees["dp_shard"] * degrees["cp"] if config.strategy.uses_fsdp() else 1
        size += 2 * num_parameters * world_size // (degrees["pp"] * degrees["tp"] * shards)
    return size


class Checkpoints:
    """Collective: every rank makes one, and calls the same methods. It is a context, within which the signals that ask
    a run to save and to leave are noted (`signals`), and which shows in the run's directory how the run ended."""

    def __init__(
        self,
        config: Config,
        tree: DictConfig,
        corpus: Corpus,
        report: Report,
        run: Path,
        start: Start,
        train_step: TrainStep,
        side_group: SideGroup,
    ) -> None:
        """Fill the state of the step from the checkpoint at which the run starts, if there is one. `run`: the run's
        directory. Raises BadInput if the step cannot be restored."""
        self.config, self.report, self.run, self.side = config, report, run, side_group
        world, facts = side_group.world, Facts({}, {}, {}, "")
        self.signals, self.opened = Signals(), ExitStack()
        self.every = 0
        self.saver: Saver | None = None
        if not isinstance(train_step, SavesState):
            self._without(config.checkpoint.every, start, world.rank)
            return
        if world.rank == 0:  # it writes the manifests
            Folder(run, config.checkpoint.keep).clean()
            print("".join(f"{line}\n" for line in start.said), end="", flush=True)
            versions = {name: str(report.facts[name]) for name in ("commit", "torch", "python")}
            values = work(config, corpus.sha256, report.facts.get(GIVEN, {}))
            facts = Facts(start.layout, versions, values, config_sha256(tree))
        if start.checkpoint is not None and start.manifest is not None:
            began, same = time.perf_counter(), start.same_layout
            restore(train_step, start.checkpoint, start.manifest, config, rank=world.rank, same=same)
            if world.rank == 0:
                size, seconds = shown_bytes(start.manifest.bytes), time.perf_counter() - began
                print(f"restored {size} in {seconds:.1f} s", flush=True)
        if start.weights is not None:
            start.weights.fill(train_step)
        self.every = config.checkpoint.every
        if self.every:
            alone, ignores = SideGroup(world, alone=True), config.train.on_nonfinite is OnNonfinite.ignore
            self.saver = Saver(config.checkpoint, run, facts, train_step, alone, ignores_nonfinite=ignores)

    def _without(self, every: int, start: Start, rank: int) -> None:
        """Say what a strategy cannot do whose step does not have what `SavesState` has."""
        name = self.config.strategy.name
        if start.checkpoint is not None:
            message = f"strategy={name} cannot start from {start.checkpoint}, as its step has no `restore`"
            raise BadInput(Problem("not_saved", message, "use checkpoint.resume=never"))
        if start.weights is not None:
            message = f"strategy={name} cannot start from {start.weights.folder}, as its step has no `restore`"
            raise BadInput(Problem("not_saved", message, "use checkpoint.weights=null"))
        if every and rank == 0:
            print(f"no checkpoints are saved, as the step of strategy={name} has no `saved`", flush=True)

    def __enter__(self) -> Checkpoints:
        self.opened.enter_context(self.report.alive(self.run))
        self.opened.enter_context(self.signals)
        self.opened.push(self._complete)
        return self

    def __exit__(self, *error: Any) -> None:
        self.opened.__exit__(*error)

    def _complete(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Complete a save that goes on in a thread, when the ranks leave together: without an error, or with one that
        all of them have. Raises SaveFailed instead of no error."""
        if self.saver is not None and error is None:
            self.saver.wait()
        elif self.saver is not None and isinstance(error, Reported) and not error.of_one_rank:
            with suppress(Reported):
                self.saver.wait()

    def after(self, step: int, metrics: Metrics) -> None:
        """Save what is due after this step. If a rank has got a signal, save and end all ranks with exit code 75."""
        last, asked = step == self.config.train.steps, metrics.asked
        if self.report.living is not None:
            self.report.living.at(step)
        if self.every and (step % self.every == 0 or last or asked):
            self._save(step, metrics, last=last or asked > 0)
        if asked and not last:
            self._leave(step, asked)

    def make_up(self, start: Start, metrics: Metrics, batches: Batches) -> None:
        """Write, compute and save what was due after the steps that the ranks carry in memory, as far as the loss of a
        rank has prevented it."""
        if start.carried is None:
            return
        metrics.make_up(start.carried, batches)
        step, steps = start.step, self.config.train.steps
        if self.saver is not None:
            due = step if step == steps else step - step % self.every
            if self.side.share_json(self.saver.folder.latest() < due):
                self._save(step, metrics, last=step == steps)

    def _save(self, step: int, metrics: Metrics, *, last: bool) -> None:
        assert self.saver is not None
        metrics.saving()
        metrics.note(self.saver.save(step, last=last))
        metrics.resume_clock()

    def _leave(self, step: int, number: int) -> None:
        """End this rank after rank 0 has said why."""
        name = signal.Signals(number).name
        saved = self.saver is not None and self.saver.good_step == step  # not if the state is not finite
        if self.report.living is not None:
            if saved:
                then = self.config.checkpoint.continues(self.run)
                say = f"checkpoint saved at step {step}: {name} ended the run; {then}"
                self.report.living.end(SAVED, name)
            else:
                say = f"{name} ended the run at step {step}, whose state was not saved"
            print(say, file=sys.stderr, flush=True)
        self.side.barrier()
        self.signals.ignore()
        raise SystemExit(EXIT_SAVED if saved else 128 + number)
