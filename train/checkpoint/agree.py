"""Ranks that were started with different configs, texts or versions would wait for each other, or compute nonsense.

torchrun starts the same line on every machine, but the line, the text and the installation of each machine are its own.
"""

from __future__ import annotations

import platform

import torch
from omegaconf import DictConfig, OmegaConf

from train.command.process.disagreement import disagreements
from train.command.resources import source_commit
from train.config.problems import BadInput
from train.config.world import World
from train.data.corpus import Corpus
from train.ranks.side_group import SideGroup
from train.record.run_folder import flat

FIX = "start all ranks with the same command line, the same text and the same installation"


def agreed(tree: DictConfig, corpus: Corpus, world: World) -> SideGroup:
    """The group for the ranks' small messages, whose first one compares what they were started with. Collective; call
    it before the ranks do anything else together.

    Raises BadInput if ranks have different values of a key, different texts or different versions: each difference with
    its ranks.
    """
    side_group = SideGroup(world)
    own = flat(OmegaConf.to_container(tree, resolve=True, enum_to_str=True))
    own |= {"torch": torch.__version__, "python": platform.python_version()}
    own |= {"the text's length": len(corpus.training) + len(corpus.validation)}
    if world.local_rank == 0 and world.world_size > world.local_world_size:  # once on each of several machines
        own |= {"the text's SHA-256": corpus.sha256, "the source's commit": source_commit()}
    by_rank = {str(rank): values for rank, values in enumerate(side_group.exchange_json(own))}
    if problems := disagreements(by_rank, "ranks", FIX):
        raise BadInput(*problems)
    return side_group
