"""What each rank of the proof runs: a list of jobs, one after the other, in one process group.

`launch/start/forked.py` starts the ranks. The folder has the references. Rank 0 writes the results to results.jsonl in
this folder, and any rank writes its error there. A job that raises ends all ranks, because others may be waiting inside
one of its collectives. Consecutive jobs with the same layout share their mesh.
"""

from __future__ import annotations

import dataclasses
import json
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from train.command import cli
from train.config.fields import IGNORE_INDEX
from train.config.plan import Plan
from train.config.problems import BadInput
from train.config.schema import Config, Precision, Qat, RuntimeConfig
from train.config.strategy import resolve_degrees
from train.config.world import World
from train.data.corpus import Corpus, load_corpus
from train.proof.collecting import CLIP_NORM, Watch, collect
from train.proof.comparison import CannotBeJudged, Evidence, bound_of, compare
from train.proof.locating.finding import Search
from train.proof.locating.locate import locate, save_run
from train.proof.phases import Phases
from train.proof.replicas import NO_COPIES
from train.ranks.distributed import Runtime, build_mesh, choose_runtime, close_groups, process_group

Result = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One config to run. `save`: the file in which its evidence is stored; without it, the evidence is compared with
    that in the file `reference`. `trace`: the beginning of the names of the files in which what the localisation needs
    is stored. `moved`: whether the inputs are moved by one unit of their last place."""

    name: str
    config: Config
    save: str = ""
    reference: str = ""
    trace: str = ""
    moved: bool = False


def references(name: str, config: Config, file: Path, *, traced: bool = False) -> list[Job]:
    """The jobs that store the evidence of one device in `file`. `traced`: with what the localisation needs of it, and
    of one device with moved inputs, in files beside it."""
    plain = Job(name, config, save=str(file), trace=str(_beside(file, "trace")) if traced else "")
    moved = Job(f"{name}, moved", config, reference=str(file), trace=str(_beside(file, "moved")), moved=True)
    return [plain, moved] if traced else [plain]


def search_in(job: Job, size: int) -> Search:
    """Search for the first thing that is wrong in a traced job that has run on `size` ranks."""
    reference = Path(job.reference)
    return locate(Plan(job.config, size), Path(job.trace), _beside(reference, "trace"), _beside(reference, "moved"))


def _beside(file: Path, what: str) -> Path:
    return file.with_name(f"{file.name}.{what}")


class Site:
    """What the jobs of one rank share: its world, the folder of results, and the mesh of the current layout."""

    def __init__(self, world: World, folder: Path, runtime: Runtime) -> None:
        self.world, self.folder, self.runtime = world, folder, runtime
        self.phases = Phases()
        self._layout: dict[str, int] = {}
        self._mesh: DeviceMesh | None = None

    def mesh(self, config: Config) -> DeviceMesh:
        """The mesh of the config's layout. If the previous job had the same layout, its mesh is used again. Otherwise
        the old groups, each with a connection to every peer and a thread, are closed, and a new mesh is made.
        Collective over the world."""
        layout = resolve_degrees(config.strategy.mesh_axes(), self.world.world_size)
        if self._mesh is None or layout != self._layout:
            close_groups()
            self._layout, self._mesh = layout, build_mesh(config, self.runtime)
        return self._mesh


def run(job: Job, site: Site) -> Result:
    """Run one job. Collective; only rank 0 returns verdicts."""
    config, phases = job.config, site.phases
    cli.check(config, site.world.world_size)
    with phases("corpus"):
        corpus = load_corpus(config)
    with phases("mesh"):
        mesh = site.mesh(config)
    reference: Evidence | None = None
    if job.reference and (site.world.rank == 0 or config.model.num_experts > 0):  # a mixture's ranks replay choices
        reference = torch.load(site.folder / job.reference, weights_only=False, mmap=True)
    watch = Watch(job.moved) if job.trace else None
    choices = reference.routing if reference is not None else {}
    try:
        found, routed = collect(config, mesh, corpus, phases, choices, watch)
    except BadInput as error:  # what the config names, such as parameters of another model
        raise CannotBeJudged(str(error)) from error
    if watch is not None:
        save_run(Path(job.trace), site.world.rank, found, watch)
    if site.world.rank > 0:
        return {}
    exercised = facts(config, corpus, found) | routed
    if reference is None:
        check_reference(found, config, corpus)
        torch.save(found, site.folder / job.save)
        return {"facts": exercised}
    with phases("compare"):
        bound = bound_of(config)
        try:
            verdicts = compare(found, reference, bound, config.differs())
        except Exception:  # the other ranks are in the next job already, in which this rank must take part
            return {"error": traceback.format_exc()}
    return {"verdicts": [dataclasses.astuple(v) for v in verdicts], "facts": exercised}


def facts(config: Config, corpus: Corpus, found: Evidence) -> dict[str, int]:
    """What these steps have exercised: `masked`, whether a target of the first step had no loss; `clipped`, whether
    clipping scaled the gradient; `copies`, whether ranks hold copies of a weight."""
    size = config.train.global_batch_size
    _, targets = corpus.batch(1, size, slice(0, size))
    return {
        "masked": bool((targets == IGNORE_INDEX).any()),
        "copies": NO_COPIES not in found.replicas,
        "clipped": float(found.grad_norm["norm"]) > CLIP_NORM,
    }


def check_reference(reference: Evidence, config: Config, corpus: Corpus) -> None:
    """Raise CannotBeJudged for the evidence of one device to which nothing can be compared."""
    train = config.train
    if train.qat is not Qat.none and config.precision is not Precision.float64:
        raise CannotBeJudged(
            f"train.qat={train.qat.value} rounds activations to few steps, and in {config.precision.value} sums in "
            "another order can fall into another step: use precision=float64"
        )
    if not corpus.any_target(1, train.global_batch_size):
        raise CannotBeJudged(
            f"all {train.global_batch_size * train.seq_len} targets of the batch are data.ignore_token="
            f"{config.data.ignore_token}, but a gradient needs a target with a loss: use another train.seed, a larger "
            "train.global_batch_size or another data.ignore_token"
        )
    for column in dataclasses.fields(reference):
        for name, tensor in getattr(reference, column.name).items():
            if not torch.isfinite(tensor).all():
                raise CannotBeJudged(
                    f"{name} ({column.name}) of one device is not finite, but only finite numbers can be compared: use "
                    "a smaller model.init_scale, or another precision or train.seed"
                )
    if not float(reference.grad_norm["norm"]):
        raise CannotBeJudged(
            "the gradient norm of one device is 0, but errors are measured relative to it: use a larger "
            "model.init_scale, or another train.seed or data"
        )


def run_jobs(
    rank: int,
    size: int,
    folder: Path,
    *,
    jobs: Sequence[Job],
    config: RuntimeConfig,
    run: Callable[[Job, Site], Result] = run,
) -> None:
    """Run the jobs on this rank. `config`: the configuration of the process group."""
    torch.set_float32_matmul_precision("highest")  # no TF32
    world = World(rank, rank, size, size, from_torchrun=True)
    runtime = choose_runtime(config, world)
    store = dist.FileStore(str(folder / "store"), size)
    store.set_timeout(timedelta(seconds=config.timeout_s))
    with process_group(runtime, world, config.timeout_s, store):
        site = Site(world, folder, runtime)
        for job in jobs:
            site.phases = Phases()
            started = time.time()
            try:
                result = run(job, site)
            except CannotBeJudged as reason:
                result = {"unjudged": str(reason)}
            except Exception:
                write(folder, {"name": job.name, "rank": rank, "error": traceback.format_exc()})
                raise
            if rank == 0:
                clock = {"started": started, "seconds": time.time() - started, "phases": site.phases.seconds}
                write(folder, {"name": job.name, **clock, **result})


def write(folder: Path, result: Result) -> None:
    with (folder / "results.jsonl").open("a") as file:
        file.write(json.dumps(result) + "\n")
