"""train/main.py with planted faults: faulty_main.py FAULT,FAULT,… FOLDER override …

Each fault happens once, and only after those before it: it makes a folder with its name in FOLDER first. Without RANK
in the environment this is launch.local, whose ranks are this program.
"""

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

AT_STEP = 5  # of those that a process makes: the first after a save
WAITING, GO = "waiting-", "go"  # files: of a process in "waits", with its number; and what it waits for
LIMIT_S = 100


class Once:
    """Whether a fault happens now. `saved`: only if the run has a complete checkpoint, to go on from."""

    def __init__(self, folder: Path, name: str, before: list[str]) -> None:
        self.folder, self.name, self.before = folder, name, before

    def __call__(self, *, saved: bool = False) -> bool:
        if not all((self.folder / name).exists() for name in self.before):
            return False
        if saved and not [*Path("runs").glob("*/checkpoints/latest")]:
            return False
        with suppress(FileExistsError):
            (self.folder / self.name).mkdir(parents=True)
            return True
        return False


def launch(faults: str, folder: str) -> None:
    from launch import local
    from train.command.resources import path_of

    torchrun_line = local.torchrun_line

    def line(*args, **options):
        words = torchrun_line(*args, **options)
        at = words.index(path_of("train/main.py"))
        return [*words[:at], __file__, faults, folder, *words[at + 1 :]]

    local.torchrun_line = line
    local.main()


def rank(number: int, faults: list[str], folder: Path) -> None:
    import torch

    from train import main, step
    from train.checkpoint import folder as folders
    from train.checkpoint import manifest, writing
    from train.ranks.elastic.elastic_generation import ElasticGeneration

    def killed(owner, name, once, condition=lambda *args: True):
        """Kill this process instead of calling the function, if the condition holds."""
        original = getattr(owner, name)

        def changed(*args, **options):
            if condition(*args) and once(saved=True):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **options)

        setattr(owner, name, changed)

    def in_step(action):
        """Change the loss of rank 1 in its step AT_STEP."""
        original, count = step.Step.__call__, 0

        def changed(self, tokens, targets, **options):
            nonlocal count
            count += 1
            forward_backward = self.forward_backward
            if number == 1 and count == AT_STEP:
                self.forward_backward = lambda *args: action(forward_backward(*args))
            result = original(self, tokens, targets, **options)
            self.forward_backward = forward_backward
            return result

        step.Step.__call__ = changed  # type: ignore[method-assign]

    def fail(loss, once):
        if once():
            raise RuntimeError("a planted error")
        return loss

    def waits(loss):
        """In every process, until the test says go."""
        folder.mkdir(exist_ok=True)
        (folder / f"{WAITING}{os.getpid()}").touch()
        deadline = time.monotonic() + LIMIT_S
        while not (folder / GO).exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        return loss

    def half_voted():
        """In the vote of step 10, when all ranks may make the update, rank 3 ends, and rank 1 notices this before it
        makes it. Rank 0 makes it."""
        original = ElasticGeneration._vote

        def changed(self, change):
            side_group = self.metrics.side_group
            barrier = side_group.barrier

            def ends():
                barrier()
                if number == 3:
                    os.kill(os.getpid(), signal.SIGKILL)
                if number == 1:
                    raise RuntimeError("planted in gloo/: connection closed by peer")

            if self.carried.step == 9 and self.world.world_size == 4:
                side_group.barrier = ends
            original(self, change)

        ElasticGeneration._vote = changed  # type: ignore[method-assign]

    plants = {
        "half_voted": lambda once: half_voted(),
        "killed_while_writing": lambda once: killed(
            writing._Hashed, "write", once, lambda file, data: number == 1 and file.size > 2**16
        ),
        "killed_before_the_manifest": lambda once: killed(manifest.Manifest, "write", once),
        "killed_before_the_name": lambda once: killed(folders.Folder, "commit", once),
        "killed_before_latest": lambda once: killed(folders.Folder, "accept", once),
        "not_finite": lambda once: in_step(lambda loss: loss * torch.nan if once() else loss),
        "raises": lambda once: in_step(lambda loss: fail(loss, once)),
        "waits": lambda once: in_step(waits),
        "other_config": lambda once: sys.argv.append("optim.lr=0.5") if number == 1 else None,
    }
    for index, name in enumerate(faults):
        plants[name](Once(folder, name, faults[:index]))
    main.main()


if __name__ == "__main__":
    names, place, *words = sys.argv[1:]
    sys.argv = [sys.argv[0], *words]
    if "RANK" in os.environ:
        rank(int(os.environ["RANK"]), names.split(",") if names != "none" else [], Path(place))
    else:
        launch(names, place)
