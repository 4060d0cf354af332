"""One colour for one thing, in TensorBoard's pictures and in the report's. The colours are Paul Tol's "bright", which
colour-blind readers tell apart. What is drawn and has no colour here is grey."""

from __future__ import annotations

BLUE, CYAN, GREEN, YELLOW = "#4477AA", "#66CCEE", "#228833", "#CCBB44"
RED, PURPLE, GREY = "#EE6677", "#AA3377", "#BBBBBB"
PART_COLOURS = {"forward": BLUE, "backward": PURPLE, "optimiser": GREEN, "communication": YELLOW, "data": CYAN}
MEMORY_COLOURS = {"parameters": RED, "gradients": PURPLE, "optimiser": GREEN, "activations": BLUE,
                  "communication": YELLOW, "temporary": CYAN}  # fmt: skip
# A piece of a pipeline's work: (what the legend says, colour, colour of the number in it).
WORK = {
    "F": ("forward", BLUE, "#ffffff"),
    "B": ("backward", PURPLE, "#ffffff"),
    "I": ("backward to the inputs", RED, "#111111"),
    "W": ("backward to the weights", CYAN, "#111111"),
}
