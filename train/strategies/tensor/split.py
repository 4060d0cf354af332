"""Who holds what under tensor parallelism: the one table, which `apply.py`, closed forms and AutoTP read."""

from __future__ import annotations

from train.config.shapes import is_expert, kv_shards
from train.config.technique import Rank, Split

# the dimension of a weight that is split, by the module's name; norms and routers are whole on every rank
SPLIT_DIM = dict.fromkeys(("wq", "wk", "wv", "gate", "up", "embed", "head"), 0) | dict.fromkeys(("wo", "down"), 1)
KV_MODULES = ("wk", "wv")
# of the weights of all experts, [E, F, D] and [E, D, F]: the columns and rows of each expert
EXPERT_SPLIT_DIM = {"gate": 1, "up": 1, "down": 2}


def split(rank: Rank, name: str) -> Split | None:
    degree, index = rank.plan.degrees["tp"], rank.place["tp"]
    if is_expert(name):
        return Split(EXPERT_SPLIT_DIM[name.split(".")[-1]], degree, index)
    module = name.split(".")[-2]
    if module not in SPLIT_DIM:
        return None
    if module in KV_MODULES:
        shards = kv_shards(rank.plan.config.model, degree)
        degree, index = shards, index // (degree // shards)
    return Split(SPLIT_DIM[module], degree, index)
