"""Which part of each parameter a rank holds with tensor parallelism. `apply.py`, the closed forms and AutoTP read this
table."""

from __future__ import annotations

from train.config.shapes import is_expert, kv_shards
from train.config.technique import Rank, Split

# the dimension in which a weight is split, by the module's name; norms and routers are whole on every rank
SPLIT_DIM = dict.fromkeys(("wq", "wk", "wv", "gate", "up", "embed", "head"), 0) | dict.fromkeys(("wo", "down"), 1)
KV_MODULES = ("wk", "wv")
# the dimension of each expert's columns and rows (F) in the experts' weights, [E, F, D] and [E, D, F]
EXPERT_SPLIT_DIM = {"gate": 1, "up": 1, "down": 2}


def split(rank: Rank, name: str) -> Split | None:
    degree, index = rank.plan.degrees["tp"], rank.place["tp"]
    if is_expert(name):
        return Split(EXPERT_SPLIT_DIM[name.split(".")[-1]], degree, index, "tp")
    module = name.split(".")[-2]
    if module not in SPLIT_DIM:
        return None
    shards = kv_shards(rank.plan.config.model, degree)
    if module in KV_MODULES and shards < degree:
        return Split(SPLIT_DIM[module], shards, index // (degree // shards), "kv_shard")
    return Split(SPLIT_DIM[module], degree, index, "tp")
