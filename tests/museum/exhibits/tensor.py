"""Exhibits of tensor and sequence parallelism."""

from tests.museum.base import Exhibit, Source
from tests.rows.base import F64, row
from tests.rows.expert import AUX
from tests.rows.tensor import ONE_KV_HEAD

FOUR = "train.micro_batch_size=1"  # with the four sequences of a batch on two ranks: four microbatches
WHOLE = "strategy.sequence_parallel=false"
MEGATRON = "NVIDIA/Megatron-LM"
COMPOSITION = "https://github.com/NVIDIA/Megatron-LM/issues/7452"
SINCE_COMPOSITION = "published 2026-09-17 with a small reproduction, open when it was read"

EXHIBITS = (
    Exhibit(
        "final_norm_gradient_not_summed",
        row(2, "strategy=tp", FOUR, bug="final_norm_gradient_not_summed"),
        "gradients",
        "tp",
        "own part only",
        Source(
            MEGATRON,
            "1446",
            "https://github.com/NVIDIA/Megatron-LM/issues/1446",
            "With tensor and sequence parallelism, the gradient of the final layer norm was different on every tensor "
            "rank before the update. The issue prints four ranks, and no two agree in a digit that matters. Every "
            "layer norm but the last one was right, so the loss curve had little to say.",
            "reported 2025-03-04, closed since",
        ),
    ),
    Exhibit(
        "norm_gradients_averaged",
        row(2, "strategy=tp", FOUR, bug="norm_gradients_averaged"),
        "gradients",
        "tp",
        "factor",
        Source(
            "EleutherAI/gpt-neox",
            "1259",
            "https://github.com/EleutherAI/gpt-neox/pull/1259",
            "The hooks that should complete the gradients of the layer norms were registered before DeepSpeed wrapped "
            "the model, so they never ran; and where they ran, they averaged what is a sum over the parts of the "
            "sequence. The loss went flat near 7.5 on a data set where it should not. Two mistakes lay on top of each "
            "other, and mending one of them changed nothing that one could see.",
            "five days in a branch: sequence parallelism came 2024-08-08 (#1257), this fix 2024-08-13",
        ),
    ),
    Exhibit(
        "router_gradient_not_summed",
        row(2, "strategy=tp", FOUR, options=AUX, bug="router_gradient_not_summed"),
        "gradients",
        "tp",
        "own part only",
        Source(
            "pytorch/torchtitan",
            "2387",
            "https://github.com/pytorch/torchtitan/issues/2387",
            "In a mixture under tensor parallelism the router's weight is replicated, but what comes back to it from "
            "the experts is only a part of its gradient. One missing word, `grad_placements`, told autograd that the "
            "part was the whole. The router's copies went apart after the first step. The reporter could not think of "
            "a worse class of bugs for mixtures, as the router drives most of the weights.",
            "reported 2026-02-17, fix opened 2026-02-21 (#2416)",
        ),
    ),
    Exhibit(
        "gathered_gradient_sliced",
        row(2, "strategy=tp", FOUR, options=AUX, bug="gathered_gradient_sliced"),
        "layers.1.feed_forward_norm",
        "tp",
        "own part only",
        Source(
            "NVIDIA-NeMo/Automodel",
            "1260",
            "https://github.com/NVIDIA-NeMo/Automodel/pull/1260",
            "Tokens were gathered over the expert ranks with `full_tensor()`, whose backward assumes that all ranks "
            "give the same gradient, and so only slices it. Here every rank has other experts and another gradient, "
            "and each token needs the sum. The model still trained, 14 % worse: a loss of 1.6 where it should have "
            "been 1.4 at step 106.",
            "fixed 2026-02-12",
        ),
    ),
    Exhibit(
        "head_input_gradient_not_summed",
        row(2, "strategy=tp", WHOLE, FOUR, bug="head_input_gradient_not_summed"),
        "norm",
        "tp",
        "own part only",
        Source(
            "NovaSky-AI/SkyRL",
            "1886",
            "https://github.com/NovaSky-AI/SkyRL/pull/1886",
            "A reviewer read Megatron's `_reduce` and saw that it sums `input.contiguous()` in place and then returns "
            "`input`. If the gradient is not contiguous, for example after a transpose, the sum goes into a copy that "
            "nobody reads. The fused head of this pull request transposed its input.",
            "found in review, 2026-07-29",
        ),
    ),
    Exhibit(
        "gradient_summed_again",
        row(2, "strategy=tp", WHOLE, FOUR, bug="gradient_summed_again"),
        "layers.1.feed_forward.up",
        "tp",
        "factor",
        Source(
            "InternLM/xtuner",
            "1004",
            "https://github.com/InternLM/xtuner/pull/1004",
            "`torch.distributed.nn.all_reduce` sums in its backward too (pytorch#58005). That is right if every rank "
            "has a loss of its own, and wrong in tensor parallelism, where all ranks have the same loss: gradients "
            "become tp times too large at every such place on the way back.",
            "fixed 2025-03-14; pytorch#58005, the behaviour behind it, is older",
        ),
    ),
    Exhibit(
        "split_weight_counted_on_one_rank",
        row(2, "strategy=tp", FOUR, bug="split_weight_counted_on_one_rank"),
        "norm",
        "tp",
        "one part missing",
        Source(
            MEGATRON,
            "7452, finding 8",
            COMPOSITION,
            "Learnable attention sinks have one entry for each head, and heads are split over tensor ranks, but the "
            "parameter is not marked as split. The norm that clips takes it for a replica, and counts the entries of "
            "the first rank only. Gradients are right, and every step is clipped too little.",
            SINCE_COMPOSITION,
        ),
    ),
    Exhibit(
        "scattered_over_another_group",
        row(4, "strategy=fsdp_tp", bug="scattered_over_another_group"),
        "embed",
        "tp",
        "unknown",
        Source(
            MEGATRON,
            "7452, finding 7",
            COMPOSITION,
            "A model that is given its process groups explicitly forgets to pass one of them on, and a scatter over "
            "the sequence falls back to the global tensor group. Both groups have the same size, so all shapes fit. "
            "Two samples [0,1,2,3] and [10,11,12,13] become [0,1,0,1] and [12,13,12,13].",
            SINCE_COMPOSITION,
        ),
    ),
    Exhibit(
        "only_first_chunk_summed",
        row(
            4,
            "strategy=tp_pp",
            "strategy.schedule=interleaved_1f1b",
            options=(F64, ONE_KV_HEAD),
            bug="only_first_chunk_summed",
        ),
        "gradients",
        "tp",
        "own part only",
        Source(
            "bigcode-project/Megatron-LM",
            "11",
            "https://github.com/bigcode-project/Megatron-LM/issues/11",
            "With multi-query attention all tensor ranks share the one key-value head, and must sum its gradient. The "
            "sum was written for `self.models[0]`. In an interleaved pipeline a rank has several models, and the "
            "others were left out. The authors found it by reading their code again.",
            "noted 2022-12-03, closed since",
        ),
    ),
    Exhibit(
        "tensor_ranks_read_other_rows",
        row(2, "strategy=tp", FOUR, bug="tensor_ranks_read_other_rows"),
        "embed",
        "tp",
        "stale",
        Source(
            "huggingface/accelerate",
            "3092",
            "https://github.com/huggingface/accelerate/issues/3092",
            "The ranks of one model-parallel group had a loader for the same data, but `prepare` cut it again by the "
            "number of processes, so that each rank got other samples. Every shape is right. A sum over tensor ranks "
            "then adds a part of one sentence to a part of another.",
            "reported 2024-09-09, closed since",
        ),
        before=("embed", "tp", "unknown"),
    ),
    Exhibit(
        "ids_of_other_ranks_not_zeroed",
        row(2, "strategy=tp", FOUR, bug="ids_of_other_ranks_not_zeroed"),
        "embed",
        "tp",
        "mask",
        Source(
            "awslabs/slapo",
            "80",
            "https://github.com/awslabs/slapo/pull/80",
            "A hook before the embedding set the ids of other ranks to 0, and a hook after it computed the same mask "
            "again to zero their vectors. By then the ids had been changed, so the mask was empty, and every rank "
            "added its row 0 for every id that it did not have. The reviewer called it pretty subtle.",
            "fixed 2023-03-15",
        ),
    ),
    Exhibit(
        "parallel_loss_of_gathered_logits",
        row(2, "strategy=tp", FOUR, bug="parallel_loss_of_gathered_logits"),
        "loss",
        "tp",
        "counted more than once",
        Source(
            MEGATRON,
            "7452, gathered logits",
            COMPOSITION,
            "A public option gathers the logits, but the loss that follows always expects a shard of the vocabulary. "
            "The result is the right loss plus log(tp): 1.1333 for 0.4402 at tp=2. A constant in the loss would do no "
            "harm, but the gradient also loses its target term.",
            SINCE_COMPOSITION,
        ),
    ),
    Exhibit(
        "gradient_only_where_the_target_is",
        row(2, "strategy=tp", FOUR, bug="gradient_only_where_the_target_is"),
        "head",
        "tp",
        "one part missing",
        Source(
            "modelscope/ms-swift",
            "9947",
            "https://github.com/modelscope/ms-swift/pull/9947",
            "The log-probability of a token was summed over tensor ranks with a plain `all_reduce`, which autograd "
            "does not follow. The number was right on every rank. Where the target belonged to another rank, the "
            "logits here got no gradient or a wrong one.",
            "fixed 2026-08-19",
        ),
    ),
)
