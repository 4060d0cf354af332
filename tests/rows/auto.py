"""`strategy=auto`: figures of devices with which the planner chooses dp, fsdp, tp and pp."""

from tests.rows.base import F64, Row, row
from train.command.planning.footprint import constant

AUTO, CORE = "strategy=auto", "hardware=cpu_default"
FAST_LINKS = ("hardware.link_gb_per_s=1000", "hardware.link_latency_us=0")


def room(mib: float) -> str:
    """A memory with so many MiB for a layout of two ranks, beside what the planner keeps free for the context, for the
    communicator of the one axis, and for fragmentation."""
    kept_free = constant("context_gib") + constant("communicator_gib")
    return f"hardware.memory_gib={(kept_free + mib / 1024) / (1 - constant('fragmentation')):.6f}"


# By the preset that is the best one with them. Each memory is in the middle between what the chosen layout and the
# smallest of those that shall not fit need, by the closed form of memory (footprint.py).
CHOSEN: dict[str, Row] = {
    # messages are slow to start, so that whole copies that are summed once a step are twice as fast as anything else
    "dp": row(2, AUTO, CORE, "hardware.link_latency_us=3000"),
    # pp needs 7.7 MiB (8.2 as gpipe) and takes 17 ms; tp needs 7.2 and takes 21; all others need at least 11.2
    "pp": row(2, AUTO, CORE, room(9.7)),
    # computation is slow, so that bubbles and short products are what costs: fsdp needs 24.0 MiB and is 6 % faster than
    # every pipeline and than tp; dp, zero1 and zero2, which are as fast, need at least 29.2
    "fsdp": row(
        *(2, AUTO, CORE, *FAST_LINKS, "hardware.matmul_tflops={float64: 0.0001}", room(26.6)),
        options=(F64, "model.num_layers=6"),
    ),
    # two stages cannot share three layers equally, so that only tp fits: it needs 10.2 MiB (9.9 if it recomputes), and
    # all others at least 13.1
    "tp": row(2, AUTO, CORE, room(11.65), options=(F64, "model.num_layers=3")),
}
ROWS = [*CHOSEN.values()]
SLOW_ROWS: list[Row] = []
