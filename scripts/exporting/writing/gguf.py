"""A file of llama.cpp's architecture `llama`, with a tokenizer of bytes.

- llama.cpp turns neighbouring rows of wq and wk by RoPE (x[2i], x[2i+1]), the lab rows that are half a head apart. So
  the rows change places. Without that a file loads, and answers wrongly.
- The tokenizer has 256 BYTE tokens <0x00> … <0xFF>, but for the space: llama.cpp writes spaces as "▁" before it looks
  for tokens, so the space is a token with this text. As BYTE tokens alone, a space would become three bytes.
- llama.cpp needs a token for the end of a text, and takes byte 2 if there is none: here it is byte 0.
- `quant=Q8_0` and `Q4_0` are for matrices. Embedding and norms stay F32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from train.model.transformer import Transformer

SPACE, END = 32, 0
LAYER = {
    "attention_norm": "attn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward_norm": "ffn_norm",
    "feed_forward.gate": "ffn_gate",
    "feed_forward.up": "ffn_up",
    "feed_forward.down": "ffn_down",
}
ENDS = {"embed": "token_embd", "norm": "output_norm", "head": "output"}


def write(model: Transformer, quant: str, facts: dict[str, str], file: Path) -> None:
    import gguf

    kind = gguf.GGMLQuantizationType[quant]
    writer = gguf.GGUFWriter(file, "llama")
    _describe(writer, model, quant, facts)
    shared = model.config.tie_embeddings and quant == "F32"  # llama.cpp then takes the embedding for the head
    for name, value in model.named_parameters(remove_duplicate=shared):
        weight = in_rope_order(name, value.detach(), model).numpy()
        if weight.ndim > 1 and not name.startswith("embed"):
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: Any, model: Transformer, quant: str, facts: dict[str, str]) -> None:
    """The metadata: what llama.cpp computes with, the tokenizer, and the facts."""
    import gguf

    config = model.config
    writer.add_name(facts["parent"])
    writer.add_license(facts["licence"])
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if quant == "F32" else f"MOSTLY_{quant}"])
    for key, value in facts.items():
        writer.add_string(f"strategy_lab.{key}", value)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_rope_dimension_count(config.dim // config.num_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    texts, kinds = vocabulary(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(texts)
    writer.add_token_scores([0.0] * len(texts))
    writer.add_token_types(kinds)
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id):
        add(END)
    for say_no in (writer.add_add_bos_token, writer.add_add_eos_token, writer.add_add_space_prefix):
        say_no(False)


def vocabulary(size: int) -> tuple[list[str], list[int]]:
    """The text and the kind of each token. Ids above 255, which no text has, are there for the shape of the weights."""
    from gguf import TokenType

    texts = [f"<0x{byte:02X}>" for byte in range(256)] + [f"<unused_{number}>" for number in range(256, size)]
    kinds = [int(TokenType.BYTE)] * 256 + [int(TokenType.UNUSED)] * (size - 256)
    texts[SPACE], kinds[SPACE] = "▁", int(TokenType.NORMAL)
    return texts, kinds


def gguf_name(name: str) -> str:
    """llama.cpp's name of a parameter of the lab's."""
    name = name.removesuffix(".weight")
    if not name.startswith("layers."):
        return f"{ENDS[name]}.weight"
    _, number, rest = name.split(".", 2)
    return f"blk.{number}.{LAYER[rest]}.weight"


def in_rope_order(name: str, weight: Tensor, model: Transformer) -> Tensor:
    """The weight, with the rows of each head of wq and wk in llama.cpp's order: 0, E/2, 1, E/2 + 1, …"""
    config = model.config
    heads = {"wq": config.num_heads, "wk": config.num_kv_heads}.get(name.split(".")[-2])
    return weight if heads is None else weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()
