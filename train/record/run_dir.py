"""The directory of a run, and its files beside the metrics: config, facts of the run, summary."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from enum import Enum
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from train.command import as_typed
from train.command.as_typed import Typed
from train.command.process.life import Living, alone_in, refuse_living
from train.command.resources import source_commit, words_of
from train.config import plain_json
from train.config.groups.run import NEVER
from train.config.problems import unusable
from train.config.schema import Config, Precision, Qat
from train.config.world import World
from train.data.corpus import Corpus
from train.measure.energy import open_meter
from train.measure.hardware import device_name
from train.ranks.distributed import Runtime
from train.record.run_files import GIVEN, write_whole
from train.record.run_folder import hash_of

NOTHING: Mapping[str, str] = MappingProxyType({})


def run_name(config: Config, tree: DictConfig, degrees: dict[str, int], world_size: int) -> str:
    """`<strategy>-<degrees>-ws<world>-<6 digits of the config's hash>`, the same for every run of this config."""
    shown = "-".join(f"{axis}{degrees[axis]}" for axis in config.strategy.mesh_axes())
    digest = config_sha256(tree)[:6]
    return "-".join(part for part in (config.strategy.name, shown, f"ws{world_size}", digest) if part)


def config_sha256(tree: DictConfig) -> str:
    return hashlib.sha256(OmegaConf.to_yaml(tree, resolve=True, sort_keys=True).encode()).hexdigest()


def runs_named(root: Path, name: str) -> list[tuple[int, Path]]:
    """The directories of the runs with this name, from the oldest to the newest: (1, `name`), (2, `name-2`) …"""
    found = [(1, root / name)] if (root / name).is_dir() else []
    numbers = ((path.name.removeprefix(f"{name}-"), path) for path in root.glob(f"{name}-*") if path.is_dir())
    return sorted(found + [(int(number), path) for number, path in numbers if re.fullmatch(r"[1-9]\d{0,8}", number)])


def make_run_dir(config: Config, tree: DictConfig, degrees: dict[str, int], world_size: int, told: str = "") -> Path:
    """Create the directory with the run's name in metrics.dir; a second run of the same config adds -2. If a file
    `told` is given, the name of the directory is written to it first. Raises BadInput (exit code 3) if the directory
    cannot be created."""
    root, name = Path(config.metrics.dir), run_name(config, tree, degrees, world_size)
    try:
        root.mkdir(parents=True, exist_ok=True)
        for number in count(max([0, *(number for number, _ in runs_named(root, name))]) + 1):
            path = root / (name if number == 1 else f"{name}-{number}")
            with suppress(FileExistsError):
                path.mkdir()
                break
    except OSError as error:
        raise unusable(config.metrics.dir, error.strerror) from error
    if told:
        write_whole(Path(told), f"{path}\n")
    write_whole(path / "config.yaml", as_typed.yaml(tree))
    return path


def claim(
    config: Config, tree: DictConfig, degrees: dict[str, int], world: World, continued: Path | None, after: int
) -> Living:
    """Lock the directory of this run: the one that is `continued` after a step, or a new one. Raises BadInput (exit
    code 3) if another process trains there, or has begun the same run since this one looked."""
    if continued is not None:
        if world.run_file:
            write_whole(Path(world.run_file), f"{continued}\n")
        return Living(continued, after, world.launch)
    root, name = Path(config.metrics.dir), run_name(config, tree, degrees, world.world_size)
    root.mkdir(parents=True, exist_ok=True)
    with alone_in(root):
        before = runs_named(root, name)
        if before and config.checkpoint.resume != NEVER:
            refuse_living(before[-1][1])
        return Living(make_run_dir(config, tree, degrees, world.world_size, world.run_file), 0, world.launch)


def work(config: Config, corpus_sha256: str, given: Mapping[str, str] = NOTHING) -> dict[str, Any]:
    """The keys that decide which numbers training computes. Two runs can be compared only if they share them. `given`:
    the hashes of what the run is given beside its text, such as its initial parameters.

    Strategy, micro batch, compilation and device decide only the speed. A text is identified by its kind
    (`data.source`) and the hash of its bytes, not by its path. The number of validation batches is included because it
    decides the validation loss. All values are plain JSON values.
    """
    data = {name: getattr(config.data, name) for name in ("source", "validation_fraction", "ignore_token")}
    names = ("seed", "seq_len", "global_batch_size", "steps", "clip_norm", "eval_batches")
    train = {name: getattr(config.train, name) for name in names}
    values = {
        "model": dataclasses.asdict(config.model),
        "data": data | {"corpus_sha256": corpus_sha256},
        "optim": dataclasses.asdict(config.optim),
        "precision": config.precision,
        "train": train,
    }
    if more := {**options_of(config), **given}:
        values[GIVEN] = more
    plain: dict[str, Any] = json.loads(json.dumps(values, default=_plain))
    return plain


def options_of(config: Config) -> dict[str, Any]:
    """The keys under `train` that decide the numbers and that few runs have, if they do not have their defaults."""
    train = config.train
    values = {"keep_zeros": train.keep_zeros, "qat": train.qat}
    found: dict[str, Any] = {name: value for name, value in values.items() if value not in (False, Qat.none)}
    if config.precision is Precision.fp8:
        found["fp8_scaling"] = train.fp8_scaling
    taught = {"distil_weight": train.distil_weight, "distil_temperature": train.distil_temperature}
    return found if train.teacher is None else found | taught


def work_hash(config: Config, corpus_sha256: str, given: Mapping[str, str] = NOTHING) -> str:
    """The hash of the run's `work`."""
    return hash_of(work(config, corpus_sha256, given))


def declared_differences(config: Config) -> dict[str, Any]:
    """How the run declares that its results differ from those of one device."""
    lossy = config.strategy.lossy()
    return {
        "differs": config.differs(),
        "lossy": None if lossy is None else {"says": str(lossy), "bound": lossy.bound},
    }


def describe_run(
    config: Config,
    tree: DictConfig,
    corpus: Corpus,
    world: World,
    runtime: Runtime,
    degrees: dict[str, int],
    path: Path,
    given: Mapping[str, str],
) -> dict[str, Any]:
    """Write work.json into the run's directory. Returns the facts that become part of the summary."""
    machine = environment(runtime.device, runtime.backend, world.world_size)
    facts = {
        "strategy": config.strategy.name,
        "degrees": {axis: degrees[axis] for axis in config.strategy.mesh_axes()},
        "precision": config.precision.value,
        **machine,
        "corpus_sha256": corpus.sha256,
        "work_hash": work_hash(config, corpus.sha256, given),
        **({GIVEN: {**given}} if given else {}),
        **declared_differences(config),
        "energy_sensor": open_meter(runtime.device).note,
    }
    size = {"tokens": len(corpus.training) + len(corpus.validation)}
    more = {**machine, **size, "command": command(world), "sweep": sweep_of(world)}  # machine includes world_size
    write_work(path, config, corpus.sha256, facts["degrees"], as_typed.from_environment(tree), given, **more)
    return facts


def write_work(
    path: Path,
    config: Config,
    corpus_sha256: str,
    degrees: dict[str, int],
    typed: Sequence[Typed] = (),
    given: Mapping[str, str] = NOTHING,
    *,
    world_size: int,
    **facts: Any,
) -> None:
    """Write `work.json` when the run starts, so that a running or killed run, without a summary, can be compared too.

    `typed`: values from the environment, which are replaced by their hashes. `work_hash` is the hash of the values
    themselves, so it does not depend on how they were given. `facts`: the environment, the size of the text, the
    command, and the name of the sweep that started the run.
    """
    shown = work(config, corpus_sha256, given)
    for one in typed:
        as_typed.put(shown, one.path, one.digest)
    values = {
        **facts,
        "work_hash": work_hash(config, corpus_sha256, given),
        "strategy": config.strategy.name,
        "degrees": degrees,
        "world_size": world_size,
        **declared_differences(config),
        "work": shown,
    }
    write_whole(path / "work.json", plain_json.dumps(values, indent=2) + "\n")


def sweep_of(world: World) -> str | None:
    """The name of the sweep's folder if a sweep started this run. The sweep's run_file is in this folder."""
    return Path(world.run_file).parent.name if world.run_file else None


def command(world: World) -> str:
    """The command of this run, as a line that can be typed again."""
    nodes = world.world_size // world.local_world_size
    words = ["torchrun", *([f"--nnodes={nodes}"] if nodes > 1 else []), f"--nproc_per_node={world.local_world_size}"]
    return shlex.join([*words, *words_of("train/main.py"), *sys.argv[1:]])


def environment(device: torch.device, backend: str, world_size: int) -> dict[str, Any]:
    """The versions and the device, which must be known to interpret a figure."""
    return {
        "commit": source_commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device_name(device),
        "platform": platform.platform(),
        "backend": backend,
        "world_size": world_size,
        "omp_threads": torch.get_num_threads(),
    }


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    write_whole(path / "summary.json", plain_json.dumps(summary, indent=2) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    raise TypeError(f"{value!r} is not a JSON value")
