"""Loads the modules of a run before a generation begins, as the others wait for a rank that is back and still loads
them. A module that is not named here is loaded when it is needed, as in any run."""

from __future__ import annotations

from importlib import import_module

from train.config.schema import Config

# Some are of folders above this one: they are named as texts, as nothing of them is used here.
NEEDED = (
    "torch._dynamo.config",
    "train.checkpoint.agree",
    "train.checkpoint.checkpoints",
    "train.measure.out_of_memory",
    "train.measure.sampling",
    "train.ranks.batches",
    "train.record.printed",
    "train.record.report",
    "train.record.sinks",
    "train.step",
    "train.strategies.data.apply",
)
OF_TENSORBOARD = ("tensorboard.compat.proto.summary_pb2", "torch.utils.tensorboard")


def load_ahead(config: Config) -> None:
    for name in (*NEEDED, *(OF_TENSORBOARD if config.metrics.tensorboard else ())):
        import_module(name)
