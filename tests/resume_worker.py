"""A rank of a world that saves and resumes. The words of a job's name say what it does (tests/test_resume.py).

same           train 4 steps and save after 2; build anew, restore, and train steps 3 and 4 again
save:A         train 2 steps, save into A, and train 2 more
load:A save:B  restore from A, save at once into B, and train 2 steps
bug:NAME       the same with a planted bug
"""

import re
from contextlib import nullcontext
from pathlib import Path

import torch

from tests.planted import BUGS, Counter
from train.checkpoint.folder import complete
from train.checkpoint.manifest import Manifest
from train.checkpoint.saver import Facts, Saver
from train.checkpoint.state import all_pieces, layout, restore
from train.config.schema import SaveMode
from train.config.strategy import SavesState
from train.data.corpus import load_corpus
from train.model.transformer import Transformer, dtypes
from train.proof import jobs
from train.ranks.distributed import own_rows
from train.ranks.optim import lr_at
from train.ranks.side_group import SideGroup

SAVED_AT, STEPS = 2, 4


class Trainer:
    """One build of a job's strategy, which trains some of its steps."""

    def __init__(self, job: jobs.Job, site: jobs.Site) -> None:
        self.config, self.site = job.config, site
        self.mesh, self.corpus = site.mesh(job.config), load_corpus(job.config)
        self.side = SideGroup(site.world, alone=True)
        model = Transformer(job.config.model, **dtypes(job.config.precision))
        self.step = job.config.strategy.build(model, self.mesh, job.config)
        self.facts = Facts(layout(job.config, site.world.world_size, site.runtime.device.type), {}, {}, "0" * 64)

    def train(self, first: int, last: int) -> list[float]:
        """The losses of these steps."""
        size = self.config.train.global_batch_size
        losses = []
        for number in range(first, last + 1):
            batch = self.corpus.batch(number, size, own_rows(self.mesh, size))
            tokens, targets = (x.to(self.site.runtime.device) for x in batch)
            losses.append(self.step(tokens, targets, lr=lr_at(number, STEPS, self.config.optim)).loss.item())
        return losses

    def save(self, run: Path) -> None:
        if self.site.world.rank == 0:
            run.mkdir()
        self.side.barrier()
        assert isinstance(self.step, SavesState)
        saver = Saver(self.config.checkpoint, run, self.facts, self.step, self.side)
        saver.save(SAVED_AT, last=self.config.checkpoint.mode is SaveMode.sync)
        saver.wait()

    def restore(self, run: Path) -> None:
        (folder,) = complete(run)
        manifest = Manifest.read(folder)
        same = manifest.layout == self.facts.layout
        assert isinstance(self.step, SavesState)
        restore(self.step, folder, manifest, self.config, rank=self.site.world.rank, same=same)

    def state(self) -> dict[str, torch.Tensor]:
        """A copy of all that this rank would save."""
        assert isinstance(self.step, SavesState)
        pieces = [*all_pieces(self.step, self.site.world.rank)]
        copied = {one.copied for one in pieces if not one.kind.startswith("rank_")}
        assert copied == {self.config.strategy.name.startswith("ds_")}, "what a step still changes is no copy"
        return {f"{one.key} at {one.offset}": one.tensor.detach().cpu().clone() for one in pieces}


def run(job: jobs.Job, site: jobs.Site) -> jobs.Result:
    words = dict(re.findall(r"(\w+):(\S+)", job.name))
    counter = Counter()
    with BUGS[words["bug"]](counter) if "bug" in words else nullcontext():
        result = same(job, site) if job.name.startswith("same") else moved(job, site, words)
    return {**result, "calls": counter.calls} if site.world.rank == 0 else {}


def same(job: jobs.Job, site: jobs.Site) -> jobs.Result:
    """{"different": what is not bitwise equal, of any rank; "losses": of the undisturbed and of the resumed run}."""
    run_dir = site.folder / re.sub(r"\W+", "_", job.name)
    first = Trainer(job, site)
    first.train(1, SAVED_AT)
    first.save(run_dir)
    undisturbed = first.train(SAVED_AT + 1, STEPS)
    expected = first.state()
    second = Trainer(job, site)
    second.restore(run_dir)
    losses = second.train(SAVED_AT + 1, STEPS)
    found = second.state()
    different = [key for key in sorted(expected.keys() | found.keys()) if not equal(expected.get(key), found.get(key))]
    everywhere = sorted({key for of_rank in first.side.exchange_json(different) for key in of_rank})
    return {"different": everywhere, "losses": [undisturbed, losses], "num_compared": len(expected)}


def moved(job: jobs.Job, site: jobs.Site, words: dict[str, str]) -> jobs.Result:
    trainer = Trainer(job, site)
    if "load" in words:
        trainer.restore(Path(words["load"]))
    else:
        trainer.train(1, SAVED_AT)
    trainer.save(Path(words["save"]))
    return {"losses": trainer.train(SAVED_AT + 1, STEPS)}


def equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
