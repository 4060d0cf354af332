"""What may differ between a checkpoint and the run that goes on from it. Torch is not imported.

Every key that decides the numbers of a run (`record.run_dir.work`) is compared, unless neither of the two runs reads
it. What is allowed is said in one line; all else is refused, each key with its reason. What only some runs are given
(`GIVEN`) decides how training goes on, and may change.
"""

from __future__ import annotations

from typing import Any

from train.config.problems import BadInput, Problem
from train.config.rules.idle import written
from train.record.run_files import GIVEN, clean
from train.record.run_folder import flat, idle

# Keys that only decide how training goes on, and those that a trained model does not need any more.
ALLOWED = {
    "train.steps",
    "train.clip_norm",
    "train.eval_batches",
    *(f"optim.{name}" for name in ("lr", "weight_decay", "warmup_steps", "schedule", "min_lr_ratio")),
    *(f"optim.{name}" for name in ("beta1", "beta2", "eps", "momentum")),
    *(f"model.{name}" for name in ("init_scale", "dropout", "aux_loss_coef")),
    "model.bias_update_rate",
}
REASONS = {
    "model": "the checkpoint's weights belong to another model",
    "data": "the run would not see each sample of the checkpoint's text once",
    "train": "the run would not see each sample once",
    "optim": "the optimiser's state in the checkpoint is of another kind",
    "precision": "the checkpoint's weights are of another type",
}
FLOAT32 = ("float32", "bf16", "fp8")  # precisions whose weights and optimiser state are float32


def allowed_changes(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The changed keys with their values, as `optim.lr=0.001 instead of 0.003`. Raises BadInput, with a problem for
    each change that is not allowed."""
    before, after = flat(saved), flat(now)
    said, problems = [], []
    keys = (before.keys() - idle(saved)) | (after.keys() - idle(now))
    for key in sorted(key for key in keys if not key.startswith(f"{GIVEN}.")):
        old, new = before.get(key), after.get(key)
        if old == new:
            continue
        shown = clean(f"{key}={written(new)} instead of {written(old)}")
        if key in ALLOWED or (key == "precision" and old in FLOAT32 and new in FLOAT32):
            said.append(shown)
            continue
        fix = "train on the same text" if key == "data.corpus_sha256" else f"use {key}={written(old)}"
        reason = REASONS.get(key.partition(".")[0], "this version of the program does not have it")
        problems.append(Problem("changed", f"{shown}: {reason}", f"{fix}, or start a new run"))
    if problems:
        raise BadInput(*problems)
    return said
