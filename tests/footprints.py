"""Drawn layouts at sizes at which memory matters, for the closed form of memory and its dry run."""

from collections.abc import Sequence

from tests.drawn import NATIVE, Drawn
from tests.test_rules import valid_configs
from train.command.validate import validate

# By how much the sizes of tests/drawn.py are multiplied. Fake tensors need no memory, so this costs nothing.
LARGER = {
    "model.dim": 32,
    "model.ffn_dim": 64,
    "model.expert_ffn_dim": 32,
    "model.vocab_size": 64,
    "train.seq_len": 64,
}
VOCABULARY = "model.vocab_size=16384"  # of a config that draws none
# what is on the host, and what is not a layout
LEFT_OUT = ("strategy.cpu_offload=", "strategy.comm_hook=", "strategy.powersgd")
SMALLEST_HEADS = 6  # heads of fewer features than 256, for which there is fused attention


def larger(one: Drawn) -> Drawn:
    words = []
    for word in one.overrides:
        key, _, value = word.partition("=")
        if not word.startswith(LEFT_OUT):
            words.append(f"{key}={int(value) * LARGER[key]}" if key in LARGER else word)
    if not any(word.startswith("model.vocab_size=") for word in words):
        words.append(VOCABULARY)
    return Drawn(tuple(words), one.world_size)


def layouts(number: int) -> list[Drawn]:
    """This many different valid layouts, every preset as often as any other."""
    found = [larger(one) for one in valid_configs(2 * number, NATIVE, 64, 6)]
    return [*dict.fromkeys(one for one in found if usable(one))][:number]


def usable(one: Drawn) -> bool:
    plan = one.plan
    model = plan.config.model
    return model.num_heads >= SMALLEST_HEADS and not validate(plan.config, plan.world_size)


def jobs_of(layouts: Sequence[Drawn], ranks: Sequence[int]) -> list[dict[str, object]]:
    return [
        {"overrides": [*one.overrides], "world_size": one.world_size, "rank": rank}
        for one, rank in zip(layouts, ranks, strict=True)
    ]
