"""The graph for ExecuTorch, with XNNPACK's kernels where it has them. It reads one sequence at a time.

`quant=8da4w` keeps the linear layers' weights in 4 bits, with a scale for every 32 weights of a row, and rounds what
they multiply to 8 bits as it comes. Embedding and norms stay float32.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch

from scripts.compressing.methods.schemes import torchao_config
from scripts.exporting.writing.graph import exported, plain_linear, with_linears
from train.model.transformer import Transformer


def write(model: Transformer, quant: str, facts: dict[str, str], file: Path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    plain = with_linears(model, plain_linear)
    if quant == "8da4w":
        _to_four_bits(plain)
    program, methods = exported(plain, batched=False), {"facts": json.dumps(facts)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler's own code
        edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], constant_methods=methods)
        made = edge.to_executorch()
    with file.open("wb") as out:
        made.write_to_file(out)


def _to_four_bits(model: torch.nn.Module) -> None:
    from torchao.quantization import quantize_
    from torchao.utils import unwrap_tensor_subclass

    quantize_(model, torchao_config("8da4w"))
    unwrap_tensor_subclass(model)
