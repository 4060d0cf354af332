"""Compile tp steps for two ranks and print, as a line of JSON for each, how often inductor uses each collective.

argv: the words of each step, as one argument. It is a separate process, because it imitates NCCL and symmetric memory,
with a fake process group. Nothing can be sent: a step ends at its first fused operator, which has no CPU kernel, after
the forward of a block was compiled.
"""

import json
import sys
from collections import Counter
from unittest import mock

import torch
import torch._inductor.config as inductor
import torch.distributed as dist
from torch.distributed._symmetric_memory import _test_mode
from torch.testing._internal.distributed.fake_pg import FakeStore

from train.command.cli import configured
from train.data.corpus import load_corpus
from train.model.transformer import Transformer, dtypes
from train.ranks.distributed import Runtime, build_mesh


def collectives(words: list[str]) -> Counter[str]:
    found: Counter[str] = Counter()

    def count(graph: torch.fx.Graph) -> None:
        targets = (str(node.target) for node in graph.nodes)
        found.update(name for name in targets if name.startswith(("symm_mem.", "_c10d_functional.")))

    torch._dynamo.reset()
    inductor.post_grad_custom_post_pass = count
    inductor.force_disable_caches = True  # a graph out of the cache is not passed
    inductor._micro_pipeline_tp = False  # as in a new process
    config = configured(["strategy=tp", "compile.enabled=true", "precision=bf16", "model.num_layers=1", *words])
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    cpu = torch.device("cpu")
    try:
        with mock.patch("torch.distributed.is_nccl_available", return_value=True), _test_mode():
            with mock.patch("train.ranks.distributed.check_backend"):
                mesh = build_mesh(config, Runtime(cpu, "fake"))
            step = config.strategy.build(Transformer(config.model, **dtypes(config.precision)), mesh, config)
            try:
                step(*load_corpus(config).batch(1, config.train.global_batch_size, slice(None)), lr=0.0)
            except NotImplementedError as error:
                if "symm_mem::" not in str(error):
                    raise
    finally:
        dist.destroy_process_group()
    return found


def main() -> None:
    for words in sys.argv[1:]:
        print(json.dumps(collectives(words.split())), flush=True)


if __name__ == "__main__":
    main()
