"""The weights with the names of transformers' LlamaForCausalLM, and its config.json."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from train.checkpoint.whole.llama import llama_config, llama_name
from train.model.transformer import Transformer


def write(model: Transformer, quant: str, facts: dict[str, str], file: Path) -> None:
    from safetensors.torch import save_file

    weights: dict[str, torch.Tensor] = {}
    for name, value in model.named_parameters():  # a weight that is shared comes once, as transformers stores it
        weights[llama_name(name)] = value.detach().contiguous()
    save_file(weights, str(file), metadata={"format": "pt", **facts})
    config = llama_config(vars(model.config), "float32")
    (file.parent / "config.json").write_text(json.dumps(config, indent=2) + "\n")
