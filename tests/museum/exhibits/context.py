"""Exhibits of context parallelism."""

from tests.museum.base import Exhibit, Source
from tests.museum.exhibits.tensor import COMPOSITION, FOUR, MEGATRON, SINCE_COMPOSITION
from tests.rows.base import row
from tests.rows.context import by

RING, GATHER, ULYSSES = by("ring"), by("allgather"), by("ulysses")
KERNEL, LAST_KERNEL = "layers.0.attention.kernel", "layers.1.attention.kernel"

EXHIBITS = (
    Exhibit(
        "labels_shifted_after_sharding",
        row(2, "strategy=cp", GATHER, FOUR, bug="labels_shifted_after_sharding"),
        "loss",
        "cp",
        "positions",
        Source(
            "verl-project/verl",
            "4250",
            "https://github.com/verl-project/verl/pull/4250",
            "A token's label is the next token. If the sequence is cut first and shifted afterwards, the last token "
            "of each piece gets a label from the wrong place. A few tokens in thousands are wrong, so the loss looks "
            "normal; here it was an outlier in a plot of log-probabilities, exactly where the sequence was cut, that "
            "gave it away.",
            "fixed 2025-11-23",
        ),
    ),
    Exhibit(
        "loss_scaled_by_cp",
        row(2, "strategy=cp", RING, FOUR, bug="loss_scaled_by_cp"),
        "loss",
        "cp",
        "factor",
        Source(
            MEGATRON,
            "906",
            "https://github.com/NVIDIA/Megatron-LM/issues/906",
            "The loss was multiplied by the number of context ranks, because gradients used to be averaged over them "
            "too. When the average changed to the data ranks alone, the factor stayed. The reporter printed the "
            "gradients of two layouts that must agree, dp2 cp4 and dp8, and they did not.",
            "reported 2024-07-07, said to be fixed 2024-09-19",
        ),
    ),
    Exhibit(
        "own_shard_of_tokens_counted",
        row(2, "strategy=cp", RING, FOUR, bug="own_shard_of_tokens_counted"),
        "loss",
        "cp",
        "factor",
        Source(
            MEGATRON,
            "7452, finding 9",
            COMPOSITION,
            "Each context rank divided its loss by the valid tokens of its own part of the sequence, and the ranks' "
            "results were averaged. With equal masks this is right. With one valid token in the sequence, two ranks "
            "halve its gradient and four make it a quarter.",
            SINCE_COMPOSITION + "; a fix was proposed 2026-09-19 (#7513)",
        ),
    ),
    Exhibit(
        "ring_backward_with_own_keys",
        row(2, "strategy=cp", RING, FOUR, bug="ring_backward_with_own_keys"),
        LAST_KERNEL,
        "cp",
        "stale",
        Source(
            "huggingface/diffusers",
            "14265",
            "https://github.com/huggingface/diffusers/issues/14265",
            "The backward of ring attention sent keys and values round the ring, as it must, into local variables. "
            "The operator that it called read them from what the forward had saved, which was the first step's. The "
            "forward is right, nothing is NaN, and a run looks perfectly healthy while it learns from corrupted "
            "gradients.",
            "reported 2026-07-21, closed since",
        ),
        before=("layers.1.attention.wv", "cp", "stale"),
    ),
    Exhibit(
        "backward_of_each_block_alone",
        row(2, "strategy=cp", GATHER, FOUR, bug="backward_of_each_block_alone"),
        LAST_KERNEL,
        "cp",
        "own part only",
        Source(
            MEGATRON,
            "1464",
            "https://github.com/NVIDIA/Megatron-LM/issues/1464",
            "With context parallelism the gradients of queries, keys and values were wrong by a relative error of up "
            "to 1.2, while the forward was right. It was found by a comparison with one device, and checked against "
            "tensor parallelism. The report does not say which line was wrong; what is planted here is one way to get "
            "there.",
            "reported 2025-03-11, closed since",
        ),
        before=("layers.1.attention.wv", "cp", "own part only"),
    ),
    Exhibit(
        "tokens_interleaved_by_all_to_all",
        row(2, "strategy=cp", ULYSSES, FOUR, bug="tokens_interleaved_by_all_to_all"),
        KERNEL,
        "cp",
        "positions",
        Source(
            "deepspeedai/DeepSpeed",
            "5664",
            "https://github.com/deepspeedai/DeepSpeed/pull/5664",
            "Several all-to-alls were merged into one, to be faster, and a reshape after it took the dimensions in "
            "the wrong order. Queries, keys and values were all corrupted in the same way, which is why nothing "
            "crashed.",
            "fix approved 2024-06-17; it seems to have come with the change to a single all-to-all",
        ),
    ),
    Exhibit(
        "rope_of_a_contiguous_part",
        row(2, "strategy=cp", RING, FOUR, bug="rope_of_a_contiguous_part"),
        KERNEL,
        "cp",
        "positions",
        Source(
            MEGATRON,
            "1612",
            "https://github.com/NVIDIA/Megatron-LM/pull/1612",
            "The table of rotary embeddings must be cut as the tokens are: one chunk from the head of the sequence "
            "and one from its tail. For the multi-modal variant the group was not passed on and the dimension was "
            "another, so it was cut elsewhere. The tokens were right and their positions were not.",
            "fix proposed 2025-06-06, in the main branch by 2025-07-17",
        ),
    ),
    Exhibit(
        "blocks_rounded_before_merging",
        row(2, "strategy=cp", RING, FOUR, bug="blocks_rounded_before_merging"),
        KERNEL,
        "cp",
        "rounding",
        Source(
            "zhuzilin/ring-flash-attention",
            "42",
            "https://github.com/zhuzilin/ring-flash-attention/issues/42",
            "The kernel gives each block's output in 16 bits, so a ring of n ranks rounds n times before it merges. "
            "The error grows with the ring and with depth; for a model of 405 B parameters on rings of 4 and 8 it was "
            "called catastrophic in the backward, while the loss of the forward looked reasonable.",
            "reported 2024-06-27, open when it was read",
        ),
    ),
)
