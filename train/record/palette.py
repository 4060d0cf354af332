"""The colours of the pictures in TensorBoard and in the report: a thing has the same colour everywhere. What has no
colour here is drawn in grey.

Kinds of work and memory have Paul Tol's "bright" and "muted" colours. Strategies have the colours of Okabe and Ito, and
darker and lighter shades of them. Colour-blind readers can tell neighbours apart. Two kinds have the same colour only
if they have the same name.
"""

from __future__ import annotations

BLUE, CYAN, GREEN, YELLOW = "#4477AA", "#66CCEE", "#228833", "#CCBB44"
RED, PURPLE, GREY = "#EE6677", "#AA3377", "#BBBBBB"
PART_COLOURS = {"forward": BLUE, "backward": PURPLE, "optimiser": GREEN, "communication": YELLOW, "data": CYAN}
MEMORY_COLOURS = {"parameters": RED, "gradients": "#EE8866", "optimiser": GREEN, "activations": "#44AA99",
                  "communication": YELLOW, "temporary": "#AAAA00"}  # fmt: skip
AXIS_COLOURS = {"pp": "#7266C9", "dp_replicate": "#117733", "dp_shard": "#CC6677", "cp": "#DDCC77", "tp": "#A0522D",
                "ep": "#88CCEE"}  # fmt: skip
# Kinds of a pipeline's work: (text in the legend, colour, colour of the number in the bar).
WORK = {
    "F": ("forward", BLUE, "#ffffff"),
    "B": ("backward", PURPLE, "#ffffff"),
    "I": ("backward to the inputs", "#CC6699", "#111111"),
    "W": ("backward to the weights", "#661144", "#ffffff"),
}
STRATEGIES = {
    "single": "#555555",
    "dp": "#0072B2", "zero1": "#4DA3D9", "zero2": "#004A75", "fsdp": "#E69F00", "hsdp": "#9C6B00",
    "tp": "#CC79A7", "pp": "#009E73", "cp": "#56B4E9", "ep": "#D55E00",
    "dp_pp": "#3B7A57", "fsdp_pp": "#7FB800", "tp_pp": "#8A4F9E", "fsdp_tp": "#B03A48", "fsdp_cp": "#C2B280",
    "cp_tp": "#7A86D1", "3d": "#6B4226", "4d": "#2F4858", "moe_3d": "#FF9E7A",
    "ds_zero1": "#8FB8DE", "ds_zero2": "#5C7A99", "ds_zero3": "#B7A800", "ds_pp": "#66C2A5", "ds_autotp": "#E78AC3",
}  # fmt: skip
OTHER_STRATEGIES = ("#999999", "#A05195", "#F95D6A", "#2F9C95", "#665191", "#D4A017")  # for the user's own, in turn


def strategy_colours(names: list[str]) -> dict[str, str]:
    """The colour of each strategy. A preset has the same colour in every report. The colour of a user's own strategy
    depends on which others are in the report."""
    own = [name for name in dict.fromkeys(names) if name not in STRATEGIES]
    return STRATEGIES | {name: OTHER_STRATEGIES[i % len(OTHER_STRATEGIES)] for i, name in enumerate(own)}
