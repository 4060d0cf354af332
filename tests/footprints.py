"""Layouts for the closed form of memory and for dry runs, at sizes at which memory matters, and their comparison."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from tempfile import NamedTemporaryFile
from typing import Any

from tests.drawn import NATIVE, Drawn
from tests.test_rules import valid_configs
from train.command.planning.footprint import Footprint, footprint, moments_of
from train.command.planning.job import of_plan
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
LENGTH = "model.max_seq_len=4096"
LEFT_OUT = ("strategy.cpu_offload=", "strategy.comm_hook=", "strategy.powersgd")  # they are no layouts
FEWEST_HEADS = 6  # with fewer, heads are wider than any fused kernel allows
RANKS = {"single": 1, "hsdp": 8, "dp_pp": 8, "fsdp_tp": 8, "fsdp_pp": 8, "fsdp_cp": 8, "tp_pp": 8, "cp_tp": 8, "3d": 8,
         "4d": 16, "moe_3d": 8}  # fmt: skip
SIZES = ("model.dim=2048", "model.num_heads=16", "model.num_kv_heads=8", "model.ffn_dim=5632", "model.vocab_size=32768",
         "model.num_layers=6", "train.seq_len=4096", "train.micro_batch_size=2",
         "precision=bf16")  # fmt: skip
MIXTURE = ("model.num_experts=8", "model.expert_ffn_dim=2816")
CLOSE = 0.01  # moments that differ by less in their totals: either may be the peak


def presets() -> Iterator[Drawn]:
    """Every preset of the lab's own engines with six layers of llama_1b or moe_1b, and every recomputation."""
    for name in NATIVE:
        mixture, ranks = name in ("ep", "moe_3d"), RANKS.get(name, 4)
        for mode in ("none", "full") if mixture else ("none", "full", "selective"):
            recomputation = f"train.activation_checkpointing={mode}"
            words = (f"strategy={name}", *SIZES, *(MIXTURE if mixture else ()), recomputation)
            one = Drawn((*words, LENGTH), ranks)
            microbatches = 4 if one.plan.degrees["pp"] > 1 else 2
            yield Drawn((*one.overrides, f"train.global_batch_size={2 * microbatches * one.plan.data_ranks}"), ranks)


def larger(one: Drawn) -> Drawn:
    words = []
    for word in one.overrides:
        key, _, value = word.partition("=")
        if not word.startswith(LEFT_OUT):
            words.append(f"{key}={int(value) * LARGER[key]}" if key in LARGER else word)
    if not any(word.startswith("model.vocab_size=") for word in words):
        words.append(VOCABULARY)
    return Drawn((*words, LENGTH), one.world_size)


def layouts(number: int) -> list[Drawn]:
    """This many different valid layouts, every preset as often as any other."""
    found = [larger(one) for one in valid_configs(2 * number, NATIVE, 64, 6)]
    return [*dict.fromkeys(one for one in found if usable(one))][:number]


def usable(one: Drawn) -> bool:
    config = one.plan.config
    return config.model.num_heads >= FEWEST_HEADS and not validate(config, one.world_size)


@dataclass(frozen=True)
class Compared:
    """The closed form of a rank beside its dry run, bytes by kind."""

    said: Footprint
    measured: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.measured.values())

    @property
    def error(self) -> float:
        return self.said.total / self.total - 1

    @cached_property
    def worst_kind(self) -> tuple[float, str]:
        """(relative error, name) of the worst kind that is more than 5 % of the peak; (0, "") without one."""
        large = [kind for kind, size in self.measured.items() if size > 0.05 * self.total]
        errors = [(self.said.kinds.get(kind, 0.0) / self.measured[kind] - 1, kind) for kind in large]
        return max(errors, key=lambda pair: abs(pair[0]), default=(0.0, ""))


def compared(one: Drawn, rank: int, measured: dict[str, float]) -> Compared:
    """With the moment, of those that are as high as the highest, whose kinds are closest."""
    found = [Footprint(kinds, rank) for kinds in moments_of(of_plan(one.plan), rank)]
    highest = max(moment.total for moment in found)
    near = [Compared(moment, measured) for moment in found if moment.total > (1 - CLOSE) * highest]
    best = min(near, key=lambda each: abs(each.worst_kind[0]))
    worst = max(near, key=lambda each: each.said.total)
    return best if abs(best.error) <= abs(worst.error) + CLOSE else worst


def fullest(one: Drawn) -> int:
    return footprint(of_plan(one.plan)).rank


def dry_runs(jobs: Sequence[tuple[Drawn, int]], timeout_s: float) -> Iterator[dict[str, Any]]:
    """The results of tests/footprint_worker.py, in the order of the (layout, rank) pairs."""
    texts = [{"overrides": [*one.overrides], "world_size": one.world_size, "rank": rank} for one, rank in jobs]
    with NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(texts, file)
        file.flush()
        command = [sys.executable, "-m", "tests.footprint_worker", file.name]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout_s)
    assert run.returncode == 0, run.stderr[-3000:]
    yield from map(json.loads, run.stdout.splitlines())
