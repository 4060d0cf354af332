"""A model in llama.cpp, through xllamacpp's server. Torch is not imported.

The server answers with log-probabilities instead of logits: they differ by one number for each token.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from scripts.exporting.artefact import Artefact
from scripts.exporting.running.slots import Array, Full

SPACE = 32  # a token that is a whole letter


class Runner:
    def __init__(self, folder: Path, artefact: Artefact, threads: int) -> None:
        import xllamacpp

        self.shape = artefact.shape
        self.read: list[int] = []
        params = xllamacpp.CommonParams()
        params.model.path = str(folder / artefact.target.file)
        params.n_ctx = self.shape.max_seq_len
        params.n_parallel, params.warmup, params.verbosity = 1, False, -1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # as in the other runtimes
        # which rounds to 16 bits: log-probabilities were 9e-4 from those of eager, and are 2e-6 without it
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        self.server = xllamacpp.Server(params)

    def logits(self, tokens_BT: Array) -> Array:
        """The log-probabilities BTV of what follows each token. Each is a request of its own, which goes on with the
        keys and values of the one before."""
        return np.stack([[self.start(row[: end + 1]) for end in range(len(row))] for row in tokens_BT])

    def start(self, prompt_T: Array) -> Array:
        """The log-probabilities V after a prompt."""
        self.read = [int(token) for token in prompt_T]
        # A byte that begins a longer letter would be held back, and its log-probabilities with it. So a space is drawn;
        # the log-probabilities are those of the model all the same.
        words = {"n_probs": self.shape.vocab_size, "logit_bias": [[SPACE, 1e6]]}
        (first,) = self.complete(self.read, 1, **words)["choices"][0]["logprobs"]["content"]
        found = np.full(self.shape.vocab_size, -np.inf, dtype=np.float32)
        for one in first["top_logprobs"]:
            found[one["id"]] = one["logprob"]
        return found

    def step(self, token: int) -> Array:
        """The log-probabilities V after one more token."""
        return self.start(np.array([*self.read, token]))

    def speed(self, prompt_T: Array, count: int) -> tuple[float, float]:
        """As that of the others, without the log-probabilities, whose texts take longer than small models."""
        prompt = [int(token) for token in prompt_T]
        self.complete([prompt[-1]], 1)  # so that nothing of the prompt is kept from before
        begin = time.perf_counter()
        self.complete(prompt, 1)
        first_s = time.perf_counter() - begin
        timings = self.complete(prompt, count + 1)["timings"]
        return first_s, 1e3 * (timings["predicted_n"] - 1) / timings["predicted_ms"]

    def complete(self, prompt: str | list[int], count: int, **more: Any) -> Any:
        """The server's answer with the `count` most likely tokens after a prompt. They need positions too, so that a
        prompt has one token less than the model has positions."""
        end = len(prompt.encode() if isinstance(prompt, str) else prompt) + count
        if end > self.shape.max_seq_len:
            raise Full(f"the model has {self.shape.max_seq_len} positions, and {end} tokens have no room in them")
        words = {"prompt": prompt, "n_predict": count, "temperature": 0, "ignore_eos": True, "cache_prompt": True}
        answer = self.server.handle_completions(words | more)
        if "choices" not in answer:
            raise RuntimeError(f"llama.cpp gives no answer: {answer}")
        return answer
