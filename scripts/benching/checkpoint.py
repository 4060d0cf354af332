"""Measures what a checkpoint costs: how long training waits for it, and how fast it is written and read.

    torchrun --nproc_per_node=2 scripts/benching/checkpoint.py strategy=fsdp model=small

In one run it saves with `checkpoint.mode=sync` and with `async`, several times each, writes as many bytes of plain data
to the same disk, and restores. It prints one JSON line: the time that training waited (`stall`) and its ratio to the
synchronous save, the steps beside a save that is being written, the speed beside that of the disk alone, and the memory
that the copies need. It takes all overrides of train/main.py. The checkpoints are in a temporary folder in metrics.dir,
on whose disk the speed depends.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from train.checkpoint.folder import complete
from train.checkpoint.manifest import Manifest, wrong_files
from train.checkpoint.saver import Facts, Saver
from train.checkpoint.state import layout, restore
from train.command import cli
from train.command.process.exits import reported_once
from train.command.process.parent import bind_to_parents
from train.command.process.streams import lasting
from train.config import plain_json
from train.config.schema import Config, SaveMode
from train.config.strategy import SavesState, TrainStep
from train.config.world import World
from train.data.corpus import load_corpus
from train.measure.hardware import Clock
from train.measure.results import GiB
from train.model.transformer import Transformer, dtypes
from train.ranks.distributed import Runtime, build_mesh, choose_runtime, own_rows, process_group
from train.ranks.optim import lr_at
from train.ranks.side_group import SideGroup
from train.record.run_dir import environment

SAVES, STEPS = 3, 2  # saves of each mode; steps before each save
Figures = dict[str, float]


class Bench:
    """One strategy, whose state is saved in several ways. Collective: every rank makes one."""

    def __init__(self, config: Config, runtime: Runtime, world: World, folder: Path) -> None:
        self.config, self.runtime, self.world, self.folder = config, runtime, world, folder
        self.mesh, self.side = build_mesh(config, runtime), SideGroup(world)
        self.step = self.build()
        self.corpus, self.done = load_corpus(config), 0
        self.clock = Clock(runtime.device)
        self.place = layout(config, world.world_size, runtime.device.type)

    def build(self) -> TrainStep:
        model = Transformer(self.config.model, **dtypes(self.config.precision))
        return self.config.strategy.build(model, self.mesh, self.config)

    def train(self) -> float:
        """Train one step. Returns its ms."""
        self.done += 1
        size, device = self.config.train.global_batch_size, self.runtime.device
        batch: list[Tensor] = [x.to(device) for x in self.corpus.batch(self.done, size, own_rows(self.mesh, size))]
        start = self.clock.mark()
        self.step(*batch, lr=lr_at(self.done, self.config.train.steps, self.config.optim))
        return self.clock.elapsed_ms(start, self.clock.mark())

    def saver(self, mode: SaveMode) -> Saver:
        run = self.folder / mode.value
        run.mkdir(exist_ok=True)
        own = replace(self.config.checkpoint, mode=mode, keep=2)
        assert isinstance(self.step, SavesState)
        return Saver(own, run, Facts(self.place, {}, {}, "0" * 64), self.step, SideGroup(self.world, alone=True))

    def save(self, mode: SaveMode) -> Figures:
        """Figures of SAVES saves: the stall of the first, the median of the others, and of the steps beside a save."""
        saver = self.saver(mode)
        stalls, seconds, speeds, beside = [], [], [], []
        for _ in range(SAVES):
            for _ in range(STEPS):
                self.train()
            self.side.barrier()
            stalls.append(saver.save(self.done, last=False)["checkpoint/stall_ms"])
            while mode is not SaveMode.sync and saver.thread is not None and any_alive(saver, self.side):
                beside.append(self.train())
            saver.wait()
            seconds.append(saver.written["checkpoint/save_s"])
            speeds.append(saver.written["checkpoint/gib_per_s"])
        found = {
            "first_stall_ms": stalls[0],
            "stall_ms": statistics.median(stalls[1:]),
            "save_s": statistics.median(seconds[1:]),
            "gib_per_s": statistics.median(speeds[1:]),
        }
        copies = sum(t.numel() * t.element_size() for t in saver.staging.values())
        return found | ({"step_beside_ms": statistics.median(beside), "copies_gib": copies / GiB} if beside else {})

    def restored(self) -> Figures:
        """The seconds to verify and to read the newest checkpoint into a new build."""
        (folder, *_), rank, size = complete(self.folder / "sync"), self.world.rank, self.world.world_size
        manifest = Manifest.read(folder)
        self.step = self.build()
        self.side.barrier()
        started = time.perf_counter()
        assert not wrong_files(folder, manifest, rank, size)
        self.side.barrier()
        verified = time.perf_counter()
        assert isinstance(self.step, SavesState)
        restore(self.step, folder, manifest, self.config, rank=rank, same=True)
        self.side.barrier()
        read = time.perf_counter()
        return {"verify_s": verified - started, "read_s": read - verified, "checkpoint_gib": manifest.bytes / GiB}

    def disk(self, size: int) -> float:
        """GiB/s of plain data: each rank writes its share of `size` bytes and syncs it."""
        share = os.urandom(2**20) * max(size // self.world.world_size // 2**20, 1)
        path = self.folder / f"plain_{self.world.rank}"
        self.side.barrier()
        started = time.perf_counter()
        with path.open("wb", buffering=0) as file:
            file.write(share)
            os.fsync(file.fileno())
        self.side.barrier()
        seconds = time.perf_counter() - started
        path.unlink()
        return len(share) * self.world.world_size / GiB / seconds


def any_alive(saver: Saver, side: SideGroup) -> bool:
    """Whether a rank still writes, so that all ranks train equally many steps."""
    thread = saver.thread
    return any(one[0] for one in side.exchange([float(thread is not None and thread.is_alive())]))


def main() -> None:
    with reported_once(World.single()):
        world, argv = World.from_env(), sys.argv[1:]
        bind_to_parents(world)
    with reported_once(world):
        config, _, _ = cli.parse(cli.parser("scripts/benching/checkpoint.py", __doc__ or ""), argv, world.rank)
        cli.check(config, world.world_size)
        runtime = choose_runtime(config.runtime, world)
        Path(config.metrics.dir).mkdir(parents=True, exist_ok=True)
        with (
            process_group(runtime, world, config.runtime.timeout_s),
            tempfile.TemporaryDirectory(dir=config.metrics.dir, prefix="bench-") as own,
        ):
            measure(Bench(config, runtime, world, Path(SideGroup(world).share(own))))


def measure(bench: Bench) -> None:
    idle = statistics.median([bench.train() for _ in range(STEPS + 3)][3:])
    sync, later = bench.save(SaveMode.sync), bench.save(SaveMode["async"])
    restored = bench.restored()
    disk = bench.disk(int(restored["checkpoint_gib"] * GiB))
    if bench.world.rank > 0:
        return
    figures = {
        **restored,
        **{f"sync_{name}": value for name, value in sync.items()},
        **{f"async_{name}": value for name, value in later.items()},
        "async_stall_over_sync": later["stall_ms"] / sync["stall_ms"],
        "async_first_stall_over_sync": later["first_stall_ms"] / sync["stall_ms"],
        "step_ms": idle,
        "disk_gib_per_s": disk,
    }
    config, device = bench.config, bench.runtime.device
    about = {"strategy": config.strategy.name, "model": config.model.name, "precision": config.precision.value}
    rounded = {name: float(f"{value:.4g}") for name, value in figures.items()}
    where = environment(device, bench.runtime.backend, bench.world.world_size)
    print(plain_json.dumps(about | rounded | {"date": time.strftime("%Y-%m-%d")} | where))


if __name__ == "__main__":
    lasting()
    main()
