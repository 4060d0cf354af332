"""The bugs that the lab planted before there was a museum, in the rows of the equivalence table. Some of them have also
been published; then their source is named. The four bugs of dropout (`tests/planted/dropout.py` and one of `tensor.py`)
are not shown: with different random numbers a strategy cannot be compared with one device, and other tests see them."""

from tests.museum.base import Exhibit, Source
from tests.museum.exhibits.data import EIGHT
from tests.museum.exhibits.tensor import FOUR, MEGATRON
from tests.rows import ROWS, Row, deepspeed
from tests.rows.base import row

SOURCES = {
    "mean_of_means": Source(
        "pytorch/torchtitan",
        "2206",
        "https://github.com/pytorch/torchtitan/pull/2206",
        "Ranks and microbatches have different numbers of valid tokens, and each divided its loss by its own. Tokens "
        "on a rank with many masked ones weighed more. The fix counts all valid tokens first, which needs all "
        "microbatches of a step before the first of them runs.",
        "fix opened 2026-01-07, issue #1842 before it",
    ),
    "shards_do_not_decay": Source(
        "mlfoundations/open_clip",
        "358",
        "https://github.com/mlfoundations/open_clip/pull/358",
        "The usual rule is that matrices decay and vectors do not, written as `p.ndim < 2`. FSDP flattens everything, "
        "so everything is a vector, and the rule puts all parameters into one group. It was noticed while FSDP was "
        "being added.",
        "seen in review, 2023-02-18",
    ),
    "norm_counts_replicas": Source(
        "ROCm/TransformerEngine",
        "715",
        "https://github.com/ROCm/TransformerEngine/pull/715",
        "Every weight was marked as split over tensor ranks, also those that are replicated, and Megatron's norm "
        "counted these once per rank. At tp=8 the norm of a DeepSeek-V3 model was 1.36 times too large, of another "
        "one 1.52 times.",
        "fixed 2026-08-25",
    ),
    "expert_gradients_times_ep": Source(
        MEGATRON,
        "5956",
        "https://github.com/NVIDIA/Megatron-LM/pull/5956",
        "The backward of the all-to-all brings an expert the gradients of all expert ranks' tokens. Who then averages "
        "over the remaining ranks divides by too few, and experts' gradients are ep times too large. Half the field "
        "has had this bug: pytorch#160285, torchtitan#1551, DeepSpeed#5618, megablocks#20.",
        "fix opened 2026-07-22; the earliest of the others is of 2023-08-29",
    ),
    "aux_loss_on_every_tp_rank": Source(
        MEGATRON,
        "5047",
        "https://github.com/NVIDIA/Megatron-LM/pull/5047",
        "The scale of the auxiliary loss did not contain the number of tensor ranks where it should have, so that "
        "runs which differed only in tp had different losses.",
        "fix opened 2026-05-28",
    ),
}
ANSWERS = {
    "accumulation_scale": ("loss", "", "factor"),
    "rank_left_out": ("gradients", "dp_replicate", "one part missing"),
    "mean_of_means": ("loss", "dp_replicate", "factor"),
    "shards_do_not_decay": ("weights", "dp_shard", "weight decay"),
    "shared_head_gradient_not_summed": ("gradients", "tp", "own part only"),
    "norm_gradient_not_summed": ("gradients", "tp", "own part only"),
    "norm_counts_replicas": ("norm", "tp", "counted more than once"),
    "maximum_of_own_shard": ("loss", "tp", "own part only"),
    "pipeline_scale": ("gradients", "", "factor"),
    "tied_gradients_not_summed": ("gradients", "pp", "own part only"),
    "rope_from_zero": ("layers.0.attention.kernel", "cp", "positions"),
    "merge_without_weights": ("layers.0.attention.kernel", "cp", "unknown"),
    "backward_of_another_step": ("layers.1.attention.kernel", "cp", "mask"),
    "expert_gradients_times_ep": ("gradients", "ep", "factor"),
    "aux_loss_of_local_sequences": ("layers.1.feed_forward_norm", "dp_shard", "factor"),
    "aux_loss_on_every_tp_rank": ("layers.1.feed_forward_norm", "tp", "factor"),
    "averaged_over_ranks": ("loss", "dp_shard", "factor"),
    "tensor_ranks_averaged": ("loss", "tp", "factor"),
}

BEFORE = {
    "backward_of_another_step": ("layers.1.attention.wv", "cp", "mask"),
    "aux_loss_on_every_tp_rank": ("layers.1.feed_forward_norm", "tp", "counted more than once"),
    "averaged_over_ranks": ("gradients", "dp_shard", "factor"),
}


def planted_rows() -> dict[str, Row]:
    """The first row of the tables with each bug."""
    found: dict[str, Row] = {}
    for one in (*ROWS, *deepspeed.ROWS):
        if one.bug:
            found.setdefault(one.bug, one)
    return found


# In these rows no degree is also the number of microbatches, and one rank is not half of all ranks.
ROW_OF = planted_rows() | {
    "accumulation_scale": row(2, "strategy=dp", FOUR, options=EIGHT, bug="accumulation_scale"),
    "rank_left_out": row(4, "strategy=dp", bug="rank_left_out"),
}
EXHIBITS = tuple(
    Exhibit(bug, ROW_OF[bug], module, axis, kind, SOURCES.get(bug), BEFORE.get(bug))
    for bug, (module, axis, kind) in ANSWERS.items()
)
