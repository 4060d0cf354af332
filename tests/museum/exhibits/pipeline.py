"""Exhibits of pipelines. Two stages run four microbatches, so that a factor names what it comes from."""

from tests.museum.base import Exhibit, Source
from tests.museum.exhibits.tensor import MEGATRON
from tests.rows.base import F64, TIED, row

TITAN = "pytorch/torchtitan"

EXHIBITS = (
    Exhibit(
        "norm_of_own_stage",
        row(2, "strategy=pp", bug="norm_of_own_stage"),
        "norm",
        "pp",
        "own part only",
        Source(
            TITAN,
            "596",
            "https://github.com/pytorch/torchtitan/issues/596",
            "`clip_grad_norm_` sees the parameters of its own stage. Every stage clipped by its own norm, so that the "
            "gradient of the whole model was not only too long, but pointed elsewhere. The question came from "
            "outside, and the answer was: I agree with this.",
            "asked 2024-10-01, fixed by #649, closed 2024-11-16",
        ),
    ),
    Exhibit(
        "scaled_after_every_microbatch",
        row(2, "strategy=pp", bug="scaled_after_every_microbatch"),
        "gradients",
        "",
        "factor",
        Source(
            TITAN,
            "1733",
            "https://github.com/pytorch/torchtitan/issues/1733",
            "torch's schedules divide all gradients by the number of microbatches at the end of a step. With gradient "
            "accumulation there are several such ends, and each divides what the ones before have divided: the "
            "accumulated gradient is a moving average instead of a sum. The reporter had just found the same mistake "
            "in his own trainer.",
            "reported 2025-09-22 together with the fix (#1732)",
        ),
    ),
    Exhibit(
        "loss_normalised_for_the_log_only",
        row(2, "strategy=pp", bug="loss_normalised_for_the_log_only"),
        "loss",
        "",
        "factor",
        Source(
            TITAN,
            "2972",
            "https://github.com/pytorch/torchtitan/issues/2972",
            "Without a pipeline the loss was divided by the number of valid tokens before the backward; with one, "
            "after it, for the log. Gradients were larger by the number of tokens in the batch. Adam hides a factor, "
            "and so does clipping.",
            "reported 2026-04-15, open when it was read",
        ),
    ),
    Exhibit(
        "only_last_microbatch_kept",
        row(2, "strategy=pp", bug="only_last_microbatch_kept"),
        "gradients",
        "",
        "one part missing",
        Source(
            "NVIDIA-NeMo/Automodel",
            "3530",
            "https://github.com/NVIDIA-NeMo/Automodel/pull/3530",
            "When the length of the sequences changed, the stages were set up again, and the last line of torch's "
            "set-up is `param.grad = None`. For pictures the length changes at nearly every microbatch, so only the "
            "last one trained the model. The loss, which is summed apart, looked fine.",
            "fixed 2026-08-13",
        ),
    ),
    Exhibit(
        "gradient_of_another_microbatch_sent",
        row(2, "strategy=pp", bug="gradient_of_another_microbatch_sent"),
        "layers.0",
        "pp",
        "stale",
        Source(
            "pytorch/pytorch",
            "139404",
            "https://github.com/pytorch/pytorch/issues/139404",
            "A stage stored its activations by microbatch, but of its gradients only the most recent one. A schedule "
            "that runs two backwards before it sends would have sent the second one twice. No test did this; it was "
            "found by thinking about what a schedule may do.",
            "noted 2024-10-31, fix proposed 2024-11-18 (#140981)",
        ),
    ),
    Exhibit(
        "evaluation_divided_again",
        row(2, "strategy=pp", bug="evaluation_divided_again"),
        "evaluate",
        "",
        "factor",
        Source(
            TITAN,
            "2366",
            "https://github.com/pytorch/torchtitan/pull/2366",
            "The loss of training was changed from a mean to a sum, and all that followed was changed with it. The "
            "validation was forgotten: it took the mean over microbatches as before, and so divided once too often.",
            "fixed 2026-02-10; it came with the change of the training loss",
        ),
    ),
    Exhibit(
        "tied_copies_misaligned",
        row(2, "strategy=pp", options=(F64, TIED), bug="tied_copies_misaligned"),
        "gradients",
        "pp",
        "positions",
        Source(
            MEGATRON,
            "6500",
            "https://github.com/NVIDIA/Megatron-LM/pull/6500",
            "The first and the last stage each hold a copy of the tied embedding in a flat buffer, at different "
            "offsets, because other parameters lie before it. Adding the buffers' shards adds elements that do not "
            "belong together. An older form of the same mistake is #844: there, data ranks had taken their shards "
            "before the stages added.",
            "fix proposed 2026-08-13",
        ),
    ),
    Exhibit(
        "one_tied_copy_summed",
        row(2, "strategy=pp", options=(F64, TIED), bug="one_tied_copy_summed"),
        "gradients",
        "pp",
        "own part only",
        Source(
            MEGATRON,
            "656",
            "https://github.com/NVIDIA/Megatron-LM/issues/656",
            "Someone compared the embedding of the first stage with the head of the last one, which are one matrix by "
            "construction, and they were not equal. The training is progressing fine, says the same report; that is "
            "what untied weights look like from outside. What is planted here is one way to untie them.",
            "reported by 2024-01-10, closed since",
        ),
    ),
    Exhibit(
        "last_stage_not_synchronised",
        row(4, "strategy=dp_pp", bug="last_stage_not_synchronised"),
        "gradients",
        "dp_replicate",
        "own part only",
        Source(
            "huggingface/picotron",
            "5",
            "https://github.com/huggingface/picotron/pull/5",
            "With data ranks around a 1F1B pipeline, the sum over data ranks must start with a stage's last backward. "
            "It was started in the cool-down phase, which the last stage does not have. Its replicas never exchanged "
            "a gradient. The pull request draws three attempts, from incorrect to correct.",
            "fixed 2024-11-01",
        ),
    ),
)
