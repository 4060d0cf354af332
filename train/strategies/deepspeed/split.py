"""Which weights AutoTP splits: those of blocks. With fewer KV heads than ranks it would cut a head in pieces:
wk and wv are then whole on every rank."""

from __future__ import annotations

from train.config.schema import ModelConfig
from train.config.shapes import kv_shards
from train.strategies.tensor.split import KV_MODULES, SPLIT_DIM

ENDS = ("embed", "head")


def split_dims(model: ModelConfig, tp: int) -> dict[str, int]:
    """The dimension in which `tp` ranks split a weight, by the module's name."""
    whole = (*ENDS, *(KV_MODULES if kv_shards(model, tp) < tp else ()))
    return {name: dim for name, dim in SPLIT_DIM.items() if name not in whole}
