"""The device that a run on this machine would use, and the planner's layout for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from train.command.planning import auto
from train.command.planning.hardware import AUTO
from train.config.schema import Config
from train.config.world import World

# Without one of these no accelerator can be used, so that torch, which takes seconds to load, need not be asked.
DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dri", "/dev/davinci_manager")


def device_here(config: Config, nproc: int) -> str:
    """By its driver; `cpu` for a CPU, and if the config names its hardware, for which nobody has to look. Raises
    BadInput (exit code 3) if the machine lacks what the config names. It imports torch where there may be an
    accelerator."""
    if (
        config.hardware.name != AUTO
        or config.runtime.device == "cpu"
        or not any(Path(path).exists() for path in DRIVERS)
    ):
        return "cpu"
    from train.measure.hardware import device_name
    from train.ranks.distributed import choose_runtime

    return device_name(choose_runtime(config.runtime, World(0, 0, nproc, nproc, from_torchrun=True)).device)


def laid_out(words: Sequence[str], nproc: int, *, kept: int = auto.KEPT) -> tuple[list[str], tuple[str, ...]]:
    """(The words with the planner's layout in place of `strategy=auto`, which it is and why); other words as they are.
    `kept`: the number of layouts that are replayed."""
    if not auto.asked(words):
        return [*words], ()
    if auto.asks_for_help(words):
        return auto.stood_in(words), ()
    choice = auto.choose(words, nproc, device_here(auto.standing(words), nproc), kept=kept)
    return auto.in_place(words, choice.words), choice.lines
