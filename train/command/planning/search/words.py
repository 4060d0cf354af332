"""What a search found, in words: a layout, and why another one is slower."""

from __future__ import annotations

import itertools

from train.command.planning.search.layouts import Layout
from train.command.planning.search.pricer import Priced
from train.config.schema import ActivationCheckpointing

RECOMPUTED = {
    ActivationCheckpointing.none: "no recomputation",
    ActivationCheckpointing.full: "full recomputation",
    ActivationCheckpointing.selective: "selective recomputation",
}
PARTS = {
    "compute": "its computation",
    "bubble": "its pipeline's bubble",
    "optimiser": "its optimiser",
    "other": "everything else",
}


def shown(layout: Layout) -> str:
    """`dp_shard 4 x tp 2, ZeRO-3, micro batch 2, no recomputation`."""
    mesh = " x ".join(f"{axis} {degree}" for axis, degree in layout.named) or "one device"
    words = [mesh]
    if layout.zero_stage:
        words.append(f"ZeRO-{layout.zero_stage}")
    if layout.schedule:
        several = f" with {layout.stages_per_rank} stages a rank" if layout.stages_per_rank > 1 else ""
        words.append(f"{layout.schedule}{several}")
    if layout.layers:
        runs = [(count, len([*same])) for count, same in itertools.groupby(layout.layers)]
        words.append("layers " + " ".join(f"{times}x{count}" if times > 1 else str(count) for count, times in runs))
    return ", ".join([*words, f"micro batch {layout.micro_batch_size}", RECOMPUTED[layout.recomputation]])


def parts(priced: Priced) -> dict[str, float]:
    """Seconds of a step by part; messages by axis."""
    time = priced.time
    exposed = {f"messages over {axis}": seconds for axis, seconds in sorted(time.exposed.items())}
    return {"compute": time.compute, **exposed, "bubble": time.bubble, "optimiser": time.optimiser, "other": time.other}


def why_slower(best: Priced, other: Priced) -> str:
    """One sentence: by how much the other is slower, and which part costs most of that."""
    slower = 100 * (other.seconds / best.seconds - 1)
    mine, theirs = parts(best), parts(other)
    more = {name: theirs.get(name, 0.0) - mine.get(name, 0.0) for name in {**mine, **theirs}}
    name = max(sorted(more), key=lambda one: more[one])
    part = PARTS.get(name, f"its {name}")
    if slower < 0.05:
        return f"{other.layout.name} ({shown(other.layout)}) is predicted as fast."
    return (
        f"{other.layout.name} ({shown(other.layout)}) is {slower:.1f} % slower: "
        f"{part} takes {1e3 * more[name]:,.3g} ms more per step."
    )
