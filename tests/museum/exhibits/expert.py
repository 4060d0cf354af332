"""Exhibits of mixtures of experts."""

from tests.museum.base import Exhibit, Source
from tests.museum.exhibits.tensor import FOUR, MEGATRON
from tests.rows.base import row
from tests.rows.context import by
from tests.rows.expert import AUX, BIAS

EIGHT = "train.global_batch_size=8"

EXHIBITS = (
    Exhibit(
        "router_learns_from_the_auxiliary_loss_only",
        row(2, "strategy=ep", FOUR, options=(*AUX, EIGHT), bug="router_learns_from_the_auxiliary_loss_only"),
        "layers.1.feed_forward.router",
        "ep",
        "one part missing",
        Source(
            "NVIDIA-NeMo/Automodel",
            "2995",
            "https://github.com/NVIDIA-NeMo/Automodel/pull/2995",
            "The routing probabilities were gathered over the expert ranks with a plain `dist.all_gather`, which "
            "autograd does not follow. The router was cut off from the main loss and learned only to keep the experts "
            "busy. Nothing warns: a gradient that is missing is a gradient of zero.",
            "fixed 2026-07-09",
        ),
    ),
    Exhibit(
        "doubled_by_every_microbatch",
        row(2, "strategy=ep", FOUR, options=(*AUX, EIGHT), bug="doubled_by_every_microbatch"),
        "gradients",
        "",
        "counted more than once",
        Source(
            MEGATRON,
            "6660",
            "https://github.com/NVIDIA/Megatron-LM/issues/6660",
            "If a gradient's data group has one rank, there is nothing to reduce, and source and destination are one "
            "buffer; adding one to the other doubles it. This happened at every microbatch, so the first of N had the "
            "weight 2^N. It needs expert parallelism over all data ranks, which is a usual layout.",
            "reproduced on two GPUs 2026-08-20, closed since",
        ),
    ),
    Exhibit(
        "experts_counted_on_one_tensor_rank",
        row(
            4,
            "strategy=ep",
            "strategy.ep=2",
            "strategy.tp=2",
            FOUR,
            options=AUX,
            bug="experts_counted_on_one_tensor_rank",
        ),
        "norm",
        "tp",
        "one part missing",
        Source(
            MEGATRON,
            "5916",
            "https://github.com/NVIDIA/Megatron-LM/pull/5916",
            "The norm must count replicated parameters once, and leaves out those of all tensor ranks but the first. "
            "For experts it asked the dense tensor group, to which they do not belong, and left out gradients that "
            "nobody else had. The update used them all; only the norm was too small. Two more bugs of the same "
            "counting followed (#6080, #6099).",
            "fix reviewed 2026-07-23",
        ),
    ),
    Exhibit(
        "balanced_after_every_microbatch",
        row(2, "strategy=fsdp", FOUR, options=(*BIAS, EIGHT), bug="balanced_after_every_microbatch"),
        "layers.0.feed_forward.router",
        "",
        "unknown",
        Source(
            "pytorch/torchtitan",
            "1324",
            "https://github.com/pytorch/torchtitan/pull/1324",
            "Balancing without an auxiliary loss moves a bias per expert once per step. It was done in a hook of the "
            "model, and so at every microbatch: with accumulation the bias moved several times as fast, and later "
            "microbatches were routed differently from the first. The pull request moved it into a hook of the "
            "optimiser.",
            "balancing came with #1114 (2025-04-17), the fix with #1324 (2025-06-21): two months",
        ),
    ),
    Exhibit(
        "auxiliary_loss_divided_by_cp",
        row(2, "strategy=cp", by("ring"), FOUR, options=AUX, bug="auxiliary_loss_divided_by_cp"),
        "layers.1.feed_forward_norm",
        "cp",
        "factor",
        Source(
            MEGATRON,
            "1652",
            "https://github.com/NVIDIA/Megatron-LM/issues/1652",
            "Gradients are divided by data and context ranks. The main loss is multiplied by the context ranks "
            "beforehand to make up for it; the auxiliary loss goes another way into the gradient, and is not. The "
            "longer the sequences, and so the more context ranks, the less the experts are balanced.",
            "reported 2025-06-26, open when it was read",
        ),
    ),
)
