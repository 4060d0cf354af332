"""What a model can be exported to, what that needs, and which pairs are refused. Torch is not imported."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from train.config.problems import EXIT_ENVIRONMENT, BadInput, Problem
from train.config.schema import ModelConfig

NONE = "none"
GROUP = 32  # weights that share a scale in 4 and 8 bits


@dataclass(frozen=True)
class Target:
    """`runtime`: where it runs. `file`: the name of the model's file. `quants`: the values of quant=, the default
    first. `needs`: the packages that write and run it. `install`: what pip installs to get them. `native`: whether the
    file is native code, so that loading it runs whatever is in it. `splits_head`: whether the file always has a head of
    its own, also where the model's head is its embedding. `log_probabilities`: whether the runtime gives these instead
    of logits, one token for each request."""

    name: str
    runtime: str
    file: str
    quants: tuple[str, ...] = (NONE,)
    needs: tuple[str, ...] = ()
    install: str = '"strategy-lab[edge]"'
    native: bool = False
    splits_head: bool = False
    log_probabilities: bool = False

    def check_packages(self) -> None:
        """Raises BadInput (exit code 3) for a package that is missing."""
        missing = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if missing:
            message = f"to={self.name} needs {', '.join(missing)}, which is not installed"
            raise BadInput(Problem("extra", message, f"pip install {self.install}", exit_code=EXIT_ENVIRONMENT))


ONNX = Target(
    "onnx",
    "onnxruntime",
    "model.onnx",
    quants=(NONE, "int8"),
    needs=("onnx", "onnxscript", "onnxruntime"),
    splits_head=True,
)
EXECUTORCH = Target(
    "executorch",
    "ExecuTorch",
    "model.pte",
    quants=(NONE, "8da4w"),
    needs=("executorch", "torchao"),
    install='"strategy-lab[edge-mobile]"',
    splits_head=True,
)
GGUF = Target(
    "gguf",
    "llama.cpp",
    "model.gguf",
    quants=("F32", "Q8_0", "Q4_0"),
    needs=("gguf", "xllamacpp"),
    log_probabilities=True,
)
SAFETENSORS = Target(
    "safetensors",
    "transformers",
    "model.safetensors",
    needs=("safetensors", "transformers"),
    install='"strategy-lab[edge]" transformers',
)
TORCH_EXPORT = Target("torch_export", "torch.export", "model.pt2")
AOTI = Target("aoti", "AOTInductor's loader", "model.pt2", native=True)
TARGETS = {one.name: one for one in (ONNX, EXECUTORCH, TORCH_EXPORT, AOTI, GGUF, SAFETENSORS)}
EXACT = (NONE, "F32")  # what is not quantised, so that its logits must be those of eager
BOUND = 1e-4  # how far they may be from them


def check(target: Target, quant: str, model: ModelConfig, is_bytes: bool) -> None:
    """Raises BadInput for a pair that does not exist, and (exit code 3) for a package that is missing. `is_bytes`:
    whether the model's tokens are bytes."""
    if quant not in target.quants:
        fix = f"use quant={' or quant='.join(target.quants)}"
        raise BadInput(Problem("quant", f"to={target.name} has no quant={quant}", fix))
    for problem in (_mixture(target, model), _tokenizer(target, model, is_bytes), _blocks(quant, model)):
        if problem:
            raise BadInput(problem)
    target.check_packages()


def _mixture(target: Target, model: ModelConfig) -> Problem | None:
    if not model.num_experts:
        return None
    why = {
        "gguf": "llama.cpp's architecture `llama` has no experts like these",
        "safetensors": "LlamaForCausalLM is dense",
    }.get(target.name, "an exported graph has fixed operations, and the tokens choose which experts are computed")
    message = f"model.num_experts={model.num_experts} cannot be exported with to={target.name}, as {why}"
    return Problem("mixture", message, "export a run with model.num_experts=0")


def _tokenizer(target: Target, model: ModelConfig, is_bytes: bool) -> Problem | None:
    if target.name != "gguf" or (is_bytes and model.vocab_size >= 256):
        return None
    message = "to=gguf writes a tokenizer of bytes into its file, and this run was trained on ids of another tokenizer"
    return Problem("tokenizer", message, "use another target, or train on a text (data=text)")


def _blocks(quant: str, model: ModelConfig) -> Problem | None:
    odd = {"model.dim": model.dim, "model.ffn_dim": model.ffn_dim}
    odd = {name: size for name, size in odd.items() if size % GROUP}
    if not odd or quant not in ("8da4w", "Q8_0", "Q4_0"):
        return None
    words = " and ".join(f"{name}={size}" for name, size in odd.items())
    message = f"quant={quant} gives every {GROUP} weights of a row one scale, and {words} is not divisible by {GROUP}"
    return Problem("blocks", message, f"export it without quant, or train a model whose sizes {GROUP} divides")
