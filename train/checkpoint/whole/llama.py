"""Exports a dense model as a folder that transformers' LlamaForCausalLM loads: safetensors and config.json.

The lab's model computes the same as LlamaForCausalLM, weight by weight, so that nothing but names changes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.checkpoint.manifest import Manifest
from train.checkpoint.whole.tensors import whole_tensor
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
    """Write config.json and the weights of a checkpoint into the new folder `target`, which is complete or not there.
    Raises BadInput for a mixture of experts or another foreign model, and OSError."""
    from safetensors import SafetensorError

    model = manifest.work.get("model", {})
    if model.get("num_experts"):
        message = f"{folder} is a mixture of {model['num_experts']} experts, but LlamaForCausalLM is dense"
        raise BadInput(Problem("export", message, "export a model with model.num_experts=0"))
    keys = [key for key in manifest.tensors if key.startswith("parameter/")]
    try:
        names = {key: llama_name(key.partition("/")[2]) for key in keys}
        config = llama_config(model, manifest.tensors[keys[0]].dtype)
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        message = f"{folder} is no model of this program ({type(error).__name__}: {error})"
        raise BadInput(Problem("export", message, "export a checkpoint of a run")) from error
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    unfinished.mkdir()
    try:
        _write(folder, manifest, names, unfinished)
        (unfinished / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        os.rename(unfinished, target)
    except SafetensorError as error:  # a full disk, for example
        raise OSError(str(error)) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write(folder: Path, manifest: Manifest, names: dict[str, str], target: Path) -> None:
    """Write the weights, and an index if they are in several files. `names`: transformers' names by keys."""
    from safetensors.torch import save_file

    shards = [*_shards([*names], manifest)]
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {names[key]: whole_tensor(folder, manifest, key) for key in shard}
        save_file(tensors, str(target / file), metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        size = sum(manifest.tensors[key].bytes for key in names)
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


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
