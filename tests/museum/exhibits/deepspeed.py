"""Exhibits of DeepSpeed, in float32: it keeps float32 weights at every precision."""

from tests.museum.base import Exhibit, Source
from tests.museum.exhibits.tensor import FOUR
from tests.rows.base import row
from tests.rows.deepspeed import f32

EIGHT = ("train.global_batch_size=8",)
DEEPSPEED = "deepspeedai/DeepSpeed"

EXHIBITS = (
    Exhibit(
        "microbatches_summed",
        f32(2, "strategy=ds_pp", bug="microbatches_summed"),
        "loss",
        "",
        "factor",
        Source(
            DEEPSPEED,
            "7773",
            "https://github.com/deepspeedai/DeepSpeed/issues/7773",
            "In the pipeline engine the gradients of microbatches were summed and never averaged. Two runs with the "
            "same global batch, cut into 4 and into 16 microbatches, had norms that differed by exactly 4. The "
            "reporter saw it only when an optimiser of his own logged the norm: Adam itself hides a factor.",
            "reported 2026-01-11, open when it was read",
        ),
    ),
    Exhibit(
        "divided_by_microbatches_again",
        f32(2, "strategy=ds_zero2", FOUR, options=EIGHT, bug="divided_by_microbatches_again"),
        "loss",
        "",
        "factor",
        Source(
            "huggingface/transformers",
            "35808",
            "https://github.com/huggingface/transformers/pull/35808",
            "The trainer had learned to divide by the number of all tokens in a step. DeepSpeed's `backward` went on "
            "dividing by the number of microbatches, unless it is told not to. Under DDP the norm did not depend on "
            "accumulation, under DeepSpeed it did.",
            "fix opened 2025-01-21",
        ),
    ),
    Exhibit(
        "labels_of_another_microbatch",
        f32(2, "strategy=ds_pp", bug="labels_of_another_microbatch"),
        "loss",
        "pp",
        "stale",
        Source(
            DEEPSPEED,
            "5729",
            "https://github.com/deepspeedai/DeepSpeed/issues/5729",
            "The pipeline engine computed the loss of the first batch's outputs with the second batch's labels. It "
            "was found because this user's batches had different shapes, so that the loss failed. With equal shapes, "
            "which almost everybody has, it would have trained.",
            "reported 2024-07-05, closed since",
        ),
    ),
    Exhibit(
        "scaled_by_every_stage",
        f32(2, "strategy=ds_pp", bug="scaled_by_every_stage"),
        "layers.0",
        "pp",
        "factor",
        Source(
            DEEPSPEED,
            "8154",
            "https://github.com/deepspeedai/DeepSpeed/pull/8154",
            "Every stage had a hook that divides the gradient of its output by the number of microbatches. The last "
            "stage must; the others receive a gradient that has been divided, and divided it again, so that a stage's "
            "gradients were too small by m to the power of its distance from the end.",
            "fix opened 2026-07-18 (issue #8152), approved 2026-07-20",
        ),
    ),
    Exhibit(
        "clipped_by_the_first_stage",
        row(2, "strategy=ds_pp", options=("precision=float32",), bug="clipped_by_the_first_stage"),
        "clip",
        "pp",
        "own part only",
    ),
)
