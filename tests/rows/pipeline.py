"""Pipelines alone: schedules, virtual stages, uneven splits, tied embeddings."""

from tests.rows.base import BF16, COMPILED, F32, F64, TIED, Row, checkpointed, presets, row

LAYERS_8 = "model.num_layers=8"
ODD_BATCH = "train.global_batch_size=3"
CHECKPOINTED = "train.activation_checkpointing=full"
SELECTIVE = "train.activation_checkpointing=selective"
VIRTUAL = ("interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv_zero_bubble", "dualpipev")


def scheduled(size: int, name: str, *strategy: str, options: tuple[str, ...] = (F64,)) -> Row:
    return row(size, "strategy=pp", f"strategy.schedule={name}", *strategy, options=options)


ROWS = [
    *presets("pp", sizes=(1, 2, 4), single=2),
    row(2, "strategy=pp", options=(BF16,)),
    *checkpointed(2, "strategy=pp"),
    *(scheduled(2, name) for name in ("gpipe", *VIRTUAL)),
    *(scheduled(4, name, options=(F64, LAYERS_8)) for name in ("interleaved_zero_bubble", "zbv_zero_bubble")),
    scheduled(2, "zbv_zero_bubble", options=(F64, SELECTIVE)),  # each half of a backward recomputes
    # three microbatches on two stages, and fewer than the stages
    scheduled(2, "1f1b", "strategy.layers_per_stage=[1,2]", options=(F64, "model.num_layers=3", ODD_BATCH)),
    scheduled(4, "gpipe", options=(F64, ODD_BATCH)),
    # tied: over two ranks, over four with stages between, on one rank
    row(2, "strategy=pp", options=(F64, TIED)),
    row(4, "strategy=pp", options=(F64, TIED)),
    scheduled(2, "zbv_zero_bubble", options=(F64, TIED)),
    row(2, "strategy=pp", bug="pipeline_scale"),
    row(2, "strategy=pp", bug="judged_on_the_first_labels"),
    row(2, "strategy=pp", options=(F64, TIED), bug="tied_gradients_not_summed"),
]
SLOW_ROWS = [
    *(scheduled(2, name, COMPILED, options=(F32,)) for name in ("1f1b", "looped_bfs")),  # one stage, and several
    *(scheduled(2, name, options=(F64, CHECKPOINTED)) for name in ("gpipe", *VIRTUAL)),
    *(scheduled(1, name) for name in ("gpipe", *VIRTUAL)),
    *(scheduled(4, name, options=(F64, LAYERS_8)) for name in ("interleaved_1f1b", "looped_bfs", "dualpipev")),
    scheduled(2, "looped_bfs", "strategy.stages_per_rank=3", options=(F64, LAYERS_8, "train.global_batch_size=5")),
    scheduled(2, "zbv_zero_bubble", "strategy.layers_per_stage=[1,3,3,1]", options=(F32, LAYERS_8)),
    scheduled(1, "interleaved_1f1b", options=(F64, TIED)),
    scheduled(4, "interleaved_1f1b", options=(F64, TIED, LAYERS_8, "train.global_batch_size=10")),
    scheduled(4, "dualpipev", options=(F64, TIED, LAYERS_8, CHECKPOINTED)),
]
