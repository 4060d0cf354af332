"""Counts the bytes of activations that one rank keeps for the backward under context parallelism.

    python -m scripts.calibrating.context_memory train.seq_len=1024

One process runs the code of rank 0 on torch's fake process group, in which collectives send nothing but all shapes are
right. It counts the storages that autograd saves in one microbatch of one sequence, without parameters. It takes the
arguments of train/main.py.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from train.command import cli
from train.command.process.exits import reported_once
from train.command.process.streams import lasting
from train.command.validate import validate
from train.config.schema import Config
from train.config.world import World
from train.model.transformer import Transformer, dtypes
from train.model.weights import materialise
from train.ranks.distributed import Runtime, build_mesh
from train.strategies.context.apply import apply_cp
from train.strategies.context.keys import CP_METHODS

DEGREES = (1, 2, 4)


def saved_bytes(config: Config, method: str, degree: int) -> int:
    """Bytes that the forward and the loss of one sequence save for the backward, on rank 0 of `degree` ranks whose
    attention uses `strategy.cp_method=method`."""
    assert validate(config, degree) == []
    device = torch.device("cpu")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=degree)
    try:
        mesh = build_mesh(config, Runtime(device, "fake"))
        model = Transformer(config.model, **dtypes(config.precision))
        apply_cp(model, mesh["cp"], method=method, seq_len=config.train.seq_len)
        materialise(model, "", config.model, seed=config.train.seed, device=device)
        parameters = {p.untyped_storage()._cdata for p in model.parameters()}
        saved: dict[int, Tensor] = {}  # keeps the tensors alive: a freed address could be counted again

        def note(x: Tensor) -> Tensor:
            if x.untyped_storage()._cdata not in parameters:
                saved[x.untyped_storage()._cdata] = x
            return x

        tokens = torch.randint(0, config.model.vocab_size, (1, config.train.seq_len))
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            loss = model.loss(model(tokens), tokens)
        total = sum(x.untyped_storage().nbytes() for x in saved.values())
        del loss
        return total
    finally:
        dist.destroy_process_group()


def main(arguments: list[str]) -> None:
    print("| `strategy.cp_method` | " + " | ".join(f"cp={n}, MiB" for n in DEGREES) + " | last / first |")
    print("|---" * (len(DEGREES) + 2) + "|")
    for method in CP_METHODS:
        overrides = ["strategy=cp", f"strategy.cp_method={method}", *arguments]
        config, _, _ = cli.parse(cli.parser("context_memory", __doc__ or ""), overrides)
        found = [saved_bytes(config, method, degree) for degree in DEGREES]
        cells = " | ".join(f"{n / 2**20:.2f}" for n in found)
        print(f"| `{method}` | {cells} | {found[-1] / found[0]:.3f} |")


if __name__ == "__main__":
    lasting()
    with reported_once(World.single(), trains=False):
        main(sys.argv[1:])
