"""Exhibits of data parallelism. Two ranks run four microbatches each, where one can choose."""

from tests.museum.base import Exhibit, Source
from tests.museum.exhibits.tensor import FOUR, MEGATRON
from tests.rows.base import F64, row

EIGHT = (F64, "train.global_batch_size=8")  # sequences: with FOUR, four microbatches on each of two ranks

EXHIBITS = (
    Exhibit(
        "first_microbatch_synchronised",
        row(2, "strategy=dp", FOUR, options=EIGHT, bug="first_microbatch_synchronised"),
        "gradients",
        "dp_replicate",
        "one part missing",
        Source(
            "modelscope/FunASR",
            "3472",
            "https://github.com/modelscope/FunASR/pull/3472",
            "`batch_idx % accum_grad` is zero for the first microbatch of a step, `(batch_idx + 1) % accum_grad` for "
            "the last. With the first, DDP summed at the start of the accumulation and stayed silent at its end, and "
            "every rank stepped with a gradient of its own: 4.0 and 7.0 in the review's two ranks, where both should "
            "have 5.5.",
            "fixed 2026-08-05",
        ),
    ),
    Exhibit(
        "never_synchronised",
        row(2, "strategy=dp", FOUR, options=EIGHT, bug="never_synchronised"),
        "gradients",
        "dp_replicate",
        "own part only",
        Source(
            "karpathy/build-nanogpt",
            "30",
            "https://github.com/karpathy/build-nanogpt/pull/30",
            "DDP reads the flag that asks for a sum in the forward, not in the backward. A well-known video sets it "
            "between the two. More accumulation should have changed nothing, and the loss was clearly worse. The "
            "author answered that nanoGPT was probably broken too.",
            "fixed 2024-06-17",
        ),
    ),
    Exhibit(
        "norm_of_own_shard",
        row(2, "strategy=fsdp", FOUR, options=EIGHT, bug="norm_of_own_shard"),
        "norm",
        "dp_shard",
        "own part only",
        Source(
            "areal-project/AReaL",
            "312",
            "https://github.com/areal-project/AReaL/issues/312",
            "With FSDP the norm was computed from the shards of a rank and never summed. Each rank clipped by its own "
            "number, and the same run was clipped differently on another number of ranks.",
            "reported 2025-09-10, fixed by #320",
        ),
    ),
    Exhibit(
        "norm_summed_over_replicas",
        row(4, "strategy=hsdp", FOUR, bug="norm_summed_over_replicas"),
        "norm",
        "dp_replicate",
        "counted more than once",
        Source(
            "ByteDance-Seed/VeOmni",
            "184",
            "https://github.com/ByteDance-Seed/VeOmni/issues/184",
            "In HSDP, shards are summed inside a group, and groups are replicas of each other. The squares of the "
            "norm were summed over all of them, so that the norm grew with the square root of the number of replicas "
            "and every step was clipped too much. The more machines, the smaller the steps.",
            "reported 2025-11-10, fixed 2026-06-24 (#862): seven months",
        ),
    ),
    Exhibit(
        "replicas_averaged",
        row(8, "strategy=hsdp", "strategy.dp_shard=4", FOUR, bug="replicas_averaged"),
        "gradients",
        "dp_replicate",
        "factor",
        Source(
            "pytorch/pytorch",
            "155903",
            "https://github.com/pytorch/pytorch/issues/155903",
            "`set_reduce_scatter_divide_factor` meant one thing for FSDP and another for HSDP, where the mean over "
            "the replicas was taken in addition. A program that set the factor to have sums got sums on one layout, "
            "and sums divided by the number of replicas on the other.",
            "reported 2025-06-13, closed since",
        ),
    ),
    Exhibit(
        "replicas_not_synchronised",
        row(
            2,
            "strategy=hsdp",
            "strategy.dp_replicate=2",
            "strategy.dp_shard=1",
            FOUR,
            options=EIGHT,
            bug="replicas_not_synchronised",
        ),
        "gradients",
        "dp_replicate",
        "own part only",
        Source(
            "verl-project/verl",
            "7493",
            "https://github.com/verl-project/verl/issues/7493",
            "`fsdp_size=1` on several GPUs reads like plain data parallelism. It switched the synchronisation of "
            "gradients off, without a word: each GPU trained a model of its own.",
        ),
    ),
    Exhibit(
        "mean_of_microbatch_means",
        row(2, "strategy=fsdp", FOUR, options=EIGHT, bug="mean_of_microbatch_means"),
        "loss",
        "",
        "factor",
        Source(
            "huggingface/transformers",
            "34191",
            "https://github.com/huggingface/transformers/pull/34191",
            "Gradient accumulation is supposed to equal one large batch. For language models it did not, in this "
            "trainer and in many others: each microbatch's loss was the mean over its own tokens, and the means were "
            "averaged, so that tokens of short texts weighed more. The project wrote that it had been caught by "
            "surprise.",
            "fixed in October 2024; since when it was there is not known",
        ),
    ),
    Exhibit(
        "full_bucket_not_reduced",
        row(2, "strategy=dp", "strategy.bucket_mb=0.25", FOUR, options=EIGHT, bug="full_bucket_not_reduced"),
        "gradients",
        "dp_replicate",
        "own part only",
        Source(
            "deepspeedai/DeepSpeed",
            "4321",
            "https://github.com/microsoft/DeepSpeed/pull/4321",
            "Hugging Face sets ZeRO-3's bucket to the square of the model's width, which is exactly the size of a "
            "square projection. Such a parameter fills a bucket alone, and this case was handled by nobody: its "
            "gradient was not reduced. The two settings are each reasonable, and only together are they wrong.",
            "fix opened 2023-09-13, merged the next day",
        ),
    ),
    Exhibit(
        "all_ranks_read_the_same_rows",
        row(2, "strategy=dp", FOUR, options=EIGHT, bug="all_ranks_read_the_same_rows"),
        "embed",
        "dp_replicate",
        "stale",
        Source(
            "stanford-crfm/mistral",
            "194",
            "https://github.com/stanford-crfm/mistral/issues/194",
            "A subclass of a trainer replaced the method that shards the data set, and all ranks read the same "
            "samples. Data parallelism became redundant: n GPUs did the work of one. It was noticed by printing the "
            "inputs.",
            "reported and fixed 2022-12-16",
        ),
        before=("embed", "dp_replicate", "counted more than once"),
    ),
    Exhibit(
        "evaluation_of_own_rows",
        row(2, "strategy=fsdp", FOUR, options=EIGHT, bug="evaluation_of_own_rows"),
        "evaluate",
        "dp_shard",
        "own part only",
        Source(
            MEGATRON,
            "6717",
            "https://github.com/NVIDIA/Megatron-LM/pull/6717",
            "A new axis had taken ranks from the data axis. Training reduced its loss over both, the evaluation over "
            "the old one: of 384 ranks that had read other samples, 6 were averaged. The number was not biased, but "
            "its error was about eight times as large, which showed as scatter between evaluations.",
            "fixed 2026-08-20",
        ),
    ),
)
