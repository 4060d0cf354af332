"""The validation loss: when it is computed, and how."""

from __future__ import annotations

import math

from train.config.schema import Config
from train.config.strategy import TrainStep
from train.measure.metrics import Metrics
from train.ranks.batches import Batches


def validation_due(config: Config, step: int) -> bool:
    """Whether the validation loss is computed after this step: every so many steps, and after the last."""
    every = config.train.eval_every
    return step == config.train.steps or (every > 0 and step % every == 0)


def validate(step: int, batches: Batches, train_step: TrainStep, metrics: Metrics) -> None:
    """Compute the validation loss after this step, and log it. Collective."""
    metrics.flush()
    loss_sum = num_valid = 0.0
    for index in range(batches.num_validation):
        loss, valid = train_step.evaluate(*batches.validation(index))
        loss_sum, num_valid = loss_sum + loss.item(), num_valid + valid.item()
    metrics.log_validation(step, loss_sum / num_valid if num_valid else math.nan)
    metrics.resume_clock()
