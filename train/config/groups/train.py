"""The keys under `train`, and those of the precision and of the compiler."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from train.config.fields import LARGE, MAX_INT64, MAX_SEQUENCES, MAX_STEPS, MAX_TOKENS, key, number


class Precision(Enum):
    """The types of numbers. Parameters, gradients and optimiser state are float64 under `float64`, otherwise float32.
    `bf16` casts weights and activations to bfloat16 for computing, and keeps reductions in float32. `fp8` is `bf16`
    with products of 8-bit numbers in the linear layers of the blocks."""

    float64 = "float64"
    float32 = "float32"
    bf16 = "bf16"
    fp8 = "fp8"

    @property
    def casts(self) -> bool:
        """Whether weights and activations are cast to bfloat16 where they are used."""
        return self in (Precision.bf16, Precision.fp8)


class ActivationCheckpointing(Enum):
    none = "none"
    full = "full"
    selective = "selective"


class OnNonfinite(Enum):
    stop = "stop"
    skip = "skip"
    ignore = "ignore"


class Fp8Scaling(Enum):
    tensorwise = "tensorwise"
    rowwise = "rowwise"


# A class statement cannot have a member whose name begins with a digit.
Qat = Enum("Qat", {"none": "none", "8da4w": "8da4w"})


@dataclass
class TrainConfig:
    steps: int = number(100, "The number of optimiser steps.", ge=1, le=MAX_STEPS)
    seed: int = number(1234, "The seed of the initial weights, the order of the data and dropout.", ge=0, le=MAX_INT64)
    seq_len: int = number(128, "The length of each sequence in tokens.", ge=1, le=MAX_TOKENS)
    global_batch_size: int = number(
        8, "The number of sequences per optimiser step, over all ranks together.", ge=1, le=MAX_SEQUENCES
    )
    micro_batch_size: int = number(
        1, "The number of sequences that a data rank processes per forward pass.", ge=1, le=MAX_SEQUENCES
    )
    eval_every: int = number(
        50, "The validation loss is computed every so many steps; with 0 only after the last.", ge=0, le=MAX_STEPS
    )
    eval_batches: int = number(
        8, "The number of global batches of held-out data in each validation.", ge=1, le=MAX_SEQUENCES
    )
    clip_norm: float = number(
        1.0, "Gradients are scaled down to this global norm; with 0 the norm is only logged.", ge=0, le=LARGE
    )
    deterministic: bool = key(False, "PyTorch uses only deterministic algorithms, which can be slower.")
    activation_checkpointing: ActivationCheckpointing = key(
        ActivationCheckpointing.none,
        "What a layer keeps for its backward: everything (none), its input (full), or also the outputs of matrix "
        "products and attention (selective); the rest is recomputed.",
    )
    offload_activations: bool = key(
        False,
        "What train.activation_checkpointing=full keeps, the inputs of layers, waits for the backward in the host's "
        "memory.",
    )
    loss_chunks: int = number(
        1,
        "The head and the loss are computed in this many chunks of a microbatch's tokens, so that the logits of one "
        "chunk exist at a time.",
        ge=1,
        le=MAX_TOKENS,
    )
    on_nonfinite: OnNonfinite = key(
        OnNonfinite.stop,
        "What happens when the loss or the gradient norm is not finite: the run stops (stop), makes no update in that "
        "step (skip), or goes on (ignore).",
    )
    keep_zeros: bool = key(
        False, "Entries of matrices that are exactly 0 in the parameters from which the run starts stay 0."
    )

    qat: Qat = key(
        Qat.none,
        "Quantisation-aware training: with 8da4w every linear layer computes with int8 activations and int4 weights, "
        "as after its conversion, while the weights that are trained and saved stay whole.",
    )

    fp8_scaling: Fp8Scaling = key(
        Fp8Scaling.tensorwise,
        "The numbers that share a scale under precision=fp8: those of a matrix (tensorwise) or those of a row "
        "(rowwise), which loses less and is slower.",
    )

    teacher: str | None = key(
        None,
        "The directory of a run, or one of its checkpoints, whose model teaches this one: training also learns its "
        "probabilities of the next token.",
    )
    distil_weight: float = number(
        0.5, "The share of the teacher's part in the loss; the rest is that of the text.", ge=0, le=1
    )
    distil_temperature: float = number(
        1.0, "What the logits of teacher and student are divided by before they are compared.", gt=0, le=1e3
    )

    def validates(self, step: int) -> bool:
        """Whether the validation loss is computed after this step: every so many steps, and after the last."""
        return step == self.steps or (self.eval_every > 0 and step % self.eval_every == 0)


@dataclass
class CompileConfig:
    enabled: bool = key(False, "Each transformer block and the loss are compiled by torch.compile.")
