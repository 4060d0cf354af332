"""`strategy=auto`: figures of devices with which the planner chooses dp, fsdp, tp and pp."""

from tests.rows.base import F64, Row, row

AUTO, CORE = "strategy=auto", "hardware=cpu_default"
FAST_LINKS = ("hardware.link_gb_per_s=1000", "hardware.link_latency_us=0")
# by the preset that is the best one with them
CHOSEN: dict[str, Row] = {
    # messages are slow to start, and the update costs nothing, so that whole copies that are summed once are best
    "dp": row(2, AUTO, CORE, "hardware.memory_gb_per_s=10000", "hardware.link_latency_us=300"),
    # half of the state fits, and messages are slow
    "pp": row(2, AUTO, CORE, "hardware.memory_gib=0.0085"),
    # links are fast, computation is slow, and gathered layers must be freed
    "fsdp": row(
        *(2, AUTO, CORE, *FAST_LINKS, "hardware.memory_gb_per_s=1", "hardware.matmul_tflops={float64: 0.01}"),
        *("hardware.memory_gib=0.02",),
        options=(F64, "model.num_layers=6"),
    ),
    # as above, but two microbatches are too few for a pipeline, and half of the state fits
    "tp": row(
        *(2, AUTO, CORE, *FAST_LINKS, "hardware.matmul_tflops={float64: 0.01}", "hardware.memory_gib=0.0085"),
        options=(F64, "train.global_batch_size=2"),
    ),
}
ROWS = [*CHOSEN.values()]
SLOW_ROWS: list[Row] = []
