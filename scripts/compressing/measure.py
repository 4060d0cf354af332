"""Loss, memory and speed of two models, measured in one process in turns, so that a busy machine meets both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from scripts.compressing.record import Record, Side
from scripts.generating.generate import Generator
from train.checkpoint.whole.trained import validation_loss
from train.config.schema import Config
from train.data.corpus import Corpus
from train.model.transformer import Transformer
from train.record.run_dir import environment

ROUNDS = 5  # of each model; the median counts


@dataclass(frozen=True)
class Speed:
    """In tokens/s, of one sequence."""

    prefill: float
    decode: float


def num_validated(config: Config, corpus: Corpus) -> int:
    """The number of tokens of a validation that have a loss."""
    count, size = config.train.eval_batches, config.train.global_batch_size
    batches = (corpus.validation_batch(index, count, size, slice(None))[1] for index in range(count))
    return sum(int((targets >= 0).sum()) for targets in batches)


def loss_of(model: Transformer, config: Config, corpus: Corpus) -> float:
    return validation_loss(model, config, corpus, str(model.rope.device))


def resident_bytes(model: nn.Module) -> int:
    """The memory of the tensors that a model computes with: parameters, buffers, and what quantised ones consist of.
    Memory that several share counts once."""
    storages: dict[int, int] = {}
    for one in (*model.parameters(), *model.buffers(), *_kept_by_modules(model)):
        for tensor in _plain(one):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _kept_by_modules(model: nn.Module) -> Iterable[Tensor]:
    """The tensors that bitsandbytes' layers keep beside their parameters: scales, and a table of the code's values."""
    for module in model.modules():
        for state in (getattr(module, "state", None), getattr(module, "quant_state", None)):
            if state is not None:
                yield from (value for value in vars(state).values() if isinstance(value, Tensor))


def _plain(tensor: Tensor) -> Iterable[Tensor]:
    """The tensors that a tensor of a subclass consists of, or the tensor itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain(getattr(tensor, name))


def timing(config: Config, tokens: int) -> dict[str, int]:
    """How speeds are measured: the tokens of the prompt, those that are generated, and the rounds."""
    length = config.model.max_seq_len
    made = min(tokens, length // 2)
    return {"prompt": length - made, "generated": made, "rounds": ROUNDS, "batch": 1}


@torch.no_grad()
def speeds(models: list[Transformer], prompt: list[int], tokens: int) -> list[Speed]:
    """Of each model: how fast it reads the prompt, and then generates so many tokens."""
    generators = [Generator(model, slots=len(prompt) + tokens) for model in models]
    for generator in generators:  # kernels are chosen, and memory is allocated
        _timed(generator, prompt, tokens)
    found = [[_timed(generator, prompt, tokens) for generator in generators] for _ in range(ROUNDS)]
    times = [[statistics.median(column) for column in zip(*rounds, strict=True)] for rounds in zip(*found, strict=True)]
    return [Speed(len(prompt) / read_s, tokens / made_s) for read_s, made_s in times]


def _timed(generator: Generator, prompt: list[int], tokens: int) -> tuple[float, float]:
    """The seconds in which the prompt is read, and in which the tokens follow."""
    start = _now(generator)
    logits_BV = generator.prefill([prompt])
    read = _now(generator)
    for _ in range(tokens):
        logits_BV = generator.decode(logits_BV.argmax(-1))
    return read - start, _now(generator) - read


def _now(generator: Generator) -> float:
    if generator.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def speeds_of(models: Sequence[Transformer], config: Config, corpus: Corpus, tokens: int) -> list[Speed]:
    """The speeds of models on text of the validation part."""
    plan = timing(config, tokens)
    prompt = corpus.validation_batch(0, 1, 1, slice(None))[0][0, : plan["prompt"]].tolist()
    prompt = (prompt * plan["prompt"])[: plan["prompt"]]  # model.max_seq_len may be more than train.seq_len
    return speeds([*models], prompt, plan["generated"])


def sides(
    models: tuple[Transformer, Transformer], sizes: tuple[int, int], config: Config, corpus: Corpus, tokens: int
) -> tuple[Side, Side]:
    """What is measured of the parent and of the compressed model. `sizes`: their bytes on the disk."""
    measured = speeds_of(models, config, corpus, tokens)
    first, second = (
        Side(loss_of(model, config, corpus), size, resident_bytes(model), speed.prefill, speed.decode)
        for model, size, speed in zip(models, sizes, measured, strict=True)
    )
    return first, second


def measured_again(
    record: Record, models: Sequence[Transformer], config: Config, corpus: Corpus, tokens: int
) -> Record:
    """The record with the memory and the speeds of these models, which are the same two on another device."""
    first, second = (
        replace(
            side,
            resident_bytes=resident_bytes(model),
            prefill_tokens_per_s=speed.prefill,
            decode_tokens_per_s=speed.decode,
        )
        for side, model, speed in zip(
            (record.before, record.after), models, speeds_of(models, config, corpus, tokens), strict=True
        )
    )
    here = environment(models[0].rope.device, "", 1)
    where = {"losses_on": record.environment["device"]}
    return replace(
        record, before=first, after=second, timing=record.timing | where, environment=record.environment | here
    )
