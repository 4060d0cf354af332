"""Exhibits of the update: what happens after right gradients."""

from tests.museum.base import Exhibit, Source
from tests.museum.exhibits.data import EIGHT
from tests.museum.exhibits.tensor import FOUR, MEGATRON
from tests.rows.base import row

EXHIBITS = (
    Exhibit(
        "only_first_rank_updates",
        row(2, "strategy=zero1", FOUR, options=EIGHT, bug="only_first_rank_updates"),
        "weights",
        "dp_shard",
        "one part missing",
        Source(
            "deepspeedai/DeepSpeed",
            "2058",
            "https://github.com/deepspeedai/DeepSpeed/pull/2058",
            "After ZeRO-2's update the float32 weights are copied back into the 16-bit ones, each rank its partition. "
            "For mixtures the number of the partition was wrong, so that only a fraction of the dense parameters was "
            "trained.",
            "fixed 2022-06-27; the same bug with offloading was left to a later fix",
        ),
    ),
    Exhibit(
        "forward_with_old_weights",
        row(2, "strategy=zero1", FOUR, options=EIGHT, bug="forward_with_old_weights"),
        "layers.1.feed_forward.up",
        "dp_shard",
        "stale",
        Source(
            MEGATRON,
            "950",
            "https://github.com/NVIDIA/Megatron-LM/issues/950",
            "The gather of new weights overlaps with the next forward, bucket by bucket, in the order in which the "
            "parameters were registered. If the forward visits them in another order, it meets a bucket that has not "
            "arrived, and uses the weights of the step before. The first step is right, and so is every gradient in "
            "it.",
            "reported 2024-07-25, open when it was read",
        ),
    ),
    Exhibit(
        "gradients_kept_after_the_update",
        row(2, "strategy=fsdp", FOUR, options=EIGHT, bug="gradients_kept_after_the_update"),
        "gradients",
        "",
        "stale",
        Source(
            "deepspeedai/DeepSpeed",
            "7839",
            "https://github.com/deepspeedai/DeepSpeed/pull/7839",
            "`zero_grad` stood behind a test for ZeRO. In bf16 without ZeRO it was never called, and each step added "
            "its gradient to those of all before. A second mistake divided the gradients by 65536, which made the "
            "first one harder to see.",
            "fixed 2026-02-09",
        ),
    ),
    Exhibit(
        "norm_logged_times_microbatches",
        row(2, "strategy=fsdp", FOUR, options=EIGHT, bug="norm_logged_times_microbatches"),
        "norm",
        "",
        "factor",
        Source(
            "NVIDIA-NeMo/RL",
            "1426",
            "https://github.com/NVIDIA-NeMo/RL/pull/1426",
            "The norm was put among the metrics of a microbatch, and metrics of microbatches are summed for the log. "
            "Training was right; the number by which people judge whether it is, was m times too large.",
            "fixed 2025-10-24",
        ),
    ),
    Exhibit(
        "everything_decays",
        row(2, "strategy=fsdp", FOUR, options=EIGHT, bug="everything_decays"),
        "weights",
        "",
        "weight decay",
        Source(
            "verl-project/verl",
            "5070",
            "https://github.com/verl-project/verl/issues/5070",
            "The FSDP path gave the optimiser `module.parameters()` in one group, with weight decay on by default, so "
            "that norms decayed too. With flattened parameters one could not even have said otherwise: matrices and "
            "norms lie in one vector.",
            "reported 2026-01-27, open when it was read; a fix was proposed 2026-07-31 (#7215)",
        ),
    ),
)
