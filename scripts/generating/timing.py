"""Measures what the cache saves: python -m scripts.generating.timing [override …] [tokens=256] [turns=3] [threads=1]

    python -m scripts.generating.timing model=small model.vocab_size=256 train.seq_len=512

Two sequences are continued by one token in turns: one with the cache, the other by reading its whole context again
for every token. The weights are drawn, as their values do not change the time. It prints the time of the last token
and that of all of them, the ratios (with the cache / without it; the median of the turns, and their range), and one
JSON line. It takes the overrides of train/main.py that choose the model, its precision and the device.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from scripts.generating.generate import Generator
from train.command import cli
from train.command.option import Option, positive
from train.command.process.exits import leave_on_interrupt, reported_once
from train.command.process.streams import lasting
from train.config import plain_json
from train.config.fields import MAX_TOKENS
from train.config.problems import BadInput, Problem
from train.config.schema import Config
from train.config.world import World
from train.measure.hardware import Clock
from train.model.transformer import Transformer, dtypes
from train.model.weights import materialise
from train.ranks.distributed import Runtime, choose_runtime
from train.record.run_dir import environment

TOOL = "scripts/generating/timing.py"
TOKENS: Option[int] = Option("tokens", 256, (TOOL,), *positive(MAX_TOKENS), example="64", help="")
TURNS: Option[int] = Option("turns", 3, (TOOL,), *positive(1_000), example="5", help="")
THREADS: Option[int] = Option("threads", 1, (TOOL,), *positive(1_024), example="2", help="")
WARM_UP = 8  # tokens


def main() -> None:
    leave_on_interrupt()
    with reported_once(World.single(), trains=False):
        argv = sys.argv[1:]
        tokens, turns, threads = TOKENS.pop(argv), TURNS.pop(argv), THREADS.pop(argv)
        config = cli.parse(cli.parser(TOOL, __doc__ or ""), ["strategy=single", *argv])[0]
        cli.check(config, 1)
        if tokens > config.model.max_seq_len:
            message = f"tokens={tokens} is more than model.max_seq_len={config.model.max_seq_len}"
            raise BadInput(Problem("tokens", message, f"use train.seq_len={tokens} or more, or fewer tokens"))
        runtime = choose_runtime(config.runtime, World.single())
        torch.set_num_threads(threads)
        print("\n".join(report(config, runtime, measured(drawn(config, runtime.device), tokens, turns))))


def drawn(config: Config, device: torch.device) -> Transformer:
    """The model with the initial weights of a run."""
    model = Transformer(config.model, **dtypes(config.precision))
    materialise(model, "", config.model, seed=config.train.seed, device=device)
    model.rope = model.rope.to(device)
    return model.eval().requires_grad_(False)


def cached(model: Transformer, tokens: int) -> Iterator[Tensor]:
    """The most likely token after token 0, then the one after both, and so on: each int64 [1]."""
    generator = Generator(model, slots=tokens)
    token = generator.prefill([[0]]).argmax(-1)
    yield token
    for _ in range(tokens - 1):
        token = generator.decode(token).argmax(-1)
        yield token


@torch.no_grad()
def recomputed(model: Transformer, tokens: int) -> Iterator[Tensor]:
    """The same by the model alone, which reads all of them again for each."""
    context = torch.zeros(1, 1, dtype=torch.long, device=model.rope.device)
    for _ in range(tokens):
        token = model(context)[:, -1].argmax(-1)
        yield token
        context = torch.cat((context, token[None]), dim=1)


WAYS = {"cached": cached, "recomputed": recomputed}


def measured(model: Transformer, tokens: int, turns: int) -> dict[str, list[list[float]]]:
    """By way, then by turn: the ms of each token. The ways take turns at every token, so that whatever else the machine
    does slows both."""
    clock = Clock(model.rope.device)
    found: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for count in (min(WARM_UP, tokens), *[tokens] * turns):
        runs = {way: run(model, count) for way, run in WAYS.items()}
        marks: dict[str, list[tuple[Any, Any]]] = {way: [] for way in WAYS}
        for _ in range(count):
            for way, run in runs.items():
                start = clock.mark()
                next(run)
                marks[way].append((start, clock.mark()))
        for way, pairs in marks.items():
            found[way].append([clock.elapsed_ms(start, end) for start, end in pairs])
    return {way: times[1:] for way, times in found.items()}


def report(config: Config, runtime: Runtime, found: dict[str, list[list[float]]]) -> list[str]:
    """A line for the last token and one for all of them, then everything as JSON."""
    tokens = len(found["cached"][0])
    figures: dict[str, Any] = {"model": config.model.name, "precision": config.precision.value, "tokens": tokens}
    lines = [f"{config.model.name} on {runtime.device.type}, {torch.get_num_threads()} thread(s), {tokens} tokens"]
    for name, what, part in (("last", f"token {tokens}", slice(-1, None)), ("all", f"all {tokens}", slice(None))):
        own, whole = ([sum(turn[part]) for turn in found[way]] for way in WAYS)
        ratios = [a / b for a, b in zip(own, whole, strict=True)]
        a, b, ratio = map(statistics.median, (own, whole, ratios))
        least, most = min(ratios), max(ratios)
        lines.append(f"{what}: {a:,.1f} ms with the cache, {b:,.1f} ms without it")
        lines[-1] += f": ratio {ratio:.4f} ({least:.4f} to {most:.4f} in {len(ratios)} turns)"
        figures |= {f"{name}_cached_ms": a, f"{name}_recomputed_ms": b, f"{name}_ratio": ratio}
        figures |= {f"{name}_ratio_range": [least, most]}
    shape = {f"model.{key}": getattr(config.model, key) for key in ("num_layers", "dim", "vocab_size", "max_seq_len")}
    where = environment(runtime.device, runtime.backend, world_size=1)
    return [*lines, plain_json.dumps(figures | shape | {"date": time.strftime("%Y-%m-%d")} | where)]


if __name__ == "__main__":
    lasting()
    main()
