"""Exports a dense model as a folder that transformers' LlamaForCausalLM loads: safetensors and config.json.

The lab's model computes the same as LlamaForCausalLM, weight by weight, so that nothing but names changes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from train.checkpoint.manifest import Manifest
from train.checkpoint.whole import whole_tensor
from train.config.problems import BadInput, Problem

# (the lab's name, the name in LlamaForCausalLM) of the parameters of a layer, and of the others
LAYER = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}
ENDS = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
SHARD_BYTES = 4 * 2**30  # of a file


def llama_name(name: str) -> str:
    """The name in LlamaForCausalLM of a parameter of the lab's."""
    if not name.startswith("layers."):
        return f"{ENDS[name.removesuffix('.weight')]}.weight"
    _, number, rest = name.split(".", 2)
    return f"model.layers.{number}.{LAYER[rest.removesuffix('.weight')]}.weight"


def llama_config(model: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json of these values of the group `model`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model["vocab_size"],
        "hidden_size": model["dim"],
        "intermediate_size": model["ffn_dim"],
        "num_hidden_layers": model["num_layers"],
        "num_attention_heads": model["num_heads"],
        "num_key_value_heads": model["num_kv_heads"],
        "head_dim": model["dim"] // model["num_heads"],
        "max_position_embeddings": model["max_seq_len"],
        "rms_norm_eps": model["norm_eps"],
        "rope_theta": model["rope_theta"],
        "tie_word_embeddings": model["tie_embeddings"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": dtype,
    }


def export(folder: Path, manifest: Manifest, target: Path) -> None:
    """Write config.json and the weights of a checkpoint into the new folder `target`. Raises BadInput for a mixture of
    experts, and OSError."""
    from safetensors.torch import save_file

    model = manifest.work["model"]
    if model["num_experts"]:
        message = f"{folder} is a mixture of {model['num_experts']} experts, but LlamaForCausalLM is dense"
        raise BadInput(Problem("export", message, "export a model with model.num_experts=0"))
    keys = [key for key in manifest.tensors if key.startswith("parameter/")]
    target.mkdir(parents=True)
    shards = [*_shards(keys, manifest)]
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = dict(_renamed(folder, manifest, shard))
        save_file(tensors, str(target / name), metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        size = sum(manifest.tensors[key].bytes for key in keys)
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    config = llama_config(model, manifest.tensors[keys[0]].dtype)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _shards(keys: list[str], manifest: Manifest) -> Iterator[list[str]]:
    """The keys in groups of at most SHARD_BYTES, so that a large model needs not be in memory at once."""
    group: list[str] = []
    size = 0
    for key in keys:
        if group and size + manifest.tensors[key].bytes > SHARD_BYTES:
            yield group
            group, size = [], 0
        group.append(key)
        size += manifest.tensors[key].bytes
    yield group


def _renamed(folder: Path, manifest: Manifest, keys: list[str]) -> Iterator[tuple[str, Tensor]]:
    for key in keys:
        yield llama_name(key.partition("/")[2]), whole_tensor(folder, manifest, key)
