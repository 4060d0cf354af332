"""A model in transformers' LlamaForCausalLM, which keeps keys and values itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from scripts.exporting.artefact import Artefact
from scripts.exporting.running.slots import Array, Full, Stepwise


class Runner(Stepwise):
    def __init__(self, folder: Path, artefact: Artefact, threads: int) -> None:
        from transformers import LlamaForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self.shape, self.filled, self.cache = artefact.shape, 0, None
        self.model = LlamaForCausalLM.from_pretrained(folder, use_safetensors=True, local_files_only=True).eval()

    @torch.no_grad()
    def logits(self, tokens_BT: Array) -> Array:
        return self.model(input_ids=torch.from_numpy(tokens_BT), use_cache=False).logits.numpy()

    def start(self, prompt_T: Array) -> Array:
        self.filled, self.cache = 0, None
        return self._read(np.asarray(prompt_T, dtype=np.int64))

    def step(self, token: int) -> Array:
        return self._read(np.array([token], dtype=np.int64))

    @torch.no_grad()
    def _read(self, tokens_T: Array) -> Array:
        self.filled += len(tokens_T)
        if self.filled > self.shape.max_seq_len:
            raise Full(
                f"the model has {self.shape.max_seq_len} positions, and {self.filled} tokens have no room in them"
            )
        ids = torch.from_numpy(tokens_T)[None]
        found = self.model(input_ids=ids, cache=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = found.cache
        return found.logits[0, -1].numpy()
