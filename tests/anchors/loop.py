"""A training loop with nothing of the lab in it but the initial weights: transformers' Llama and schedule, torch's
AdamW and `clip_grad_norm_`, and data that numpy reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from tests.anchors.text import NO_LOSS, SPACE, Text
from tests.anchors.theirs import Llama, schedule
from train.config.schema import Config
from train.model.transformer import Transformer, dtypes
from train.model.weights import materialise

STEPS, WARMUP, EVAL_EVERY, EVAL_BATCHES = 10, 3, 5, 3
ROWS, MICRO_ROWS, SEQ_LEN, SEED = 4, 2, 16, 1234
CLIP_NORM, LR, BETAS, EPS, DECAY = 2.5, 1e-2, (0.8, 0.9), 1e-6, 0.1


def words(text: Path, runs: Path) -> list[str]:
    """The command line of the same training in the lab."""
    return [
        *("strategy=single", "model=tiny", "precision=float64", "runtime.device=cpu"),
        *("model.num_layers=2", "model.dim=32", "model.num_heads=4", "model.num_kv_heads=2", "model.ffn_dim=48"),
        *("data=text", f"data.path={text}", f"data.ignore_token={SPACE}", f"train.seed={SEED}"),
        *(f"train.steps={STEPS}", f"train.eval_every={EVAL_EVERY}", f"train.eval_batches={EVAL_BATCHES}"),
        *(f"train.global_batch_size={ROWS}", f"train.micro_batch_size={MICRO_ROWS}", f"train.seq_len={SEQ_LEN}"),
        *(f"train.clip_norm={CLIP_NORM}", f"optim.lr={LR}", f"optim.warmup_steps={WARMUP}", f"optim.eps={EPS}"),
        *(f"optim.beta1={BETAS[0]}", f"optim.beta2={BETAS[1]}", f"optim.weight_decay={DECAY}"),
        *(f"metrics.dir={runs}", "metrics.tensorboard=false", "metrics.profile_every=0", "metrics.warmup_steps=2"),
    ]


@dataclass
class Expected:
    """What the loop found, by step. `valid`: for each step, the number of targets with a loss in each microbatch."""

    num_parameters: int
    num_tensors: int
    flops_per_token: float
    bigram_loss: float
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    validations: dict[int, float] = field(default_factory=dict)
    valid: list[list[int]] = field(default_factory=list)


def train(config: Config, path: Path) -> Expected:
    """Train on the text at `path`. `config`: the lab's config of the same training, for the model's shape, the initial
    weights and the kind of schedule."""
    llama = Llama(config.model, initial_weights(config), attention="sdpa", raised=True)
    text = Text.read(path, SEQ_LEN)
    matrices = [p for p in llama.parameters().values() if p.ndim > 1]
    norms = [p for p in llama.parameters().values() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": norms, "weight_decay": 0.0}]
    optimiser = AdamW(groups, lr=LR, betas=BETAS, eps=EPS)
    rates = schedule(optimiser, config.optim, STEPS)
    optimiser.step()  # no gradients, so no update: transformers' schedules begin with a step at a rate of 0
    rates.step()
    found = Expected(
        num_parameters=sum(p.numel() for p in llama.model.parameters()),
        num_tensors=len(llama.parameters()),
        flops_per_token=flops_per_token(llama),
        bigram_loss=text.bigram_loss(EVAL_BATCHES * ROWS),
    )
    for step in range(1, STEPS + 1):
        tokens, targets = text.batch(SEED, step, ROWS)
        num_valid = int(np.sum(targets != NO_LOSS))
        _, loss = llama(torch.from_numpy(tokens), torch.from_numpy(targets), num_valid)
        optimiser.zero_grad()
        loss.backward()
        norm = clip_grad_norm_(llama.model.parameters(), CLIP_NORM)
        found.losses.append(loss.item())
        found.norms.append(norm.item())
        found.rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        rates.step()
        found.valid.append([int(np.sum(part != NO_LOSS)) for part in np.split(targets, ROWS // MICRO_ROWS)])
        if step % EVAL_EVERY == 0:
            found.validations[step] = validation_loss(llama, text)
    return found


def initial_weights(config: Config) -> dict[str, Tensor]:
    """The weights with which the lab starts."""
    model = Transformer(config.model, **dtypes(config.precision))
    materialise(model, "", config.model, seed=SEED, device=torch.device("cpu"))
    return {name: p.detach() for name, p in model.named_parameters()}


@torch.no_grad()
def validation_loss(llama: Llama, text: Text) -> float:
    """The mean over the targets with a loss of all validation windows, computed at once."""
    tokens, targets = text.validation(EVAL_BATCHES * ROWS)
    _, loss = llama(torch.from_numpy(tokens), torch.from_numpy(targets), int(np.sum(targets != NO_LOSS)))
    return loss.item()


def flops_per_token(llama: Llama) -> float:
    """6 for each weight of a matrix product, and 12 x width x T for the attention of each layer."""
    products = sum(m.weight.numel() for m in llama.model.modules() if isinstance(m, nn.Linear))
    shape = llama.model.config
    return 6.0 * products + 12.0 * shape.num_hidden_layers * shape.hidden_size * SEQ_LEN
