"""Known networks, scaled to this machine: the same ratio of computation to bandwidth as there.

If a process here multiplies s times as fast as a device there, then a link of s times the rate takes the same share of
a step for the same model and batch. Latency is not scaled: that of the links here is what it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import yaml

from train.command.resources import CONFIG_DIR
from train.config.problems import BadInput, Problem

PATH = CONFIG_DIR / "networks.yaml"


@dataclass(frozen=True)
class Preset:
    """`tflops`: of a device there. `inter_gbit`, `intra_gbit`: a device's share of the links between and in hosts."""

    name: str
    tflops: float
    inter_gbit: float
    intra_gbit: float
    source: str

    def scaled(self, tflops_here: float, per_node: int) -> tuple[float, float]:
        """(The rate of a host's link, the rate inside a host) in bit/s, for `per_node` processes in a host here.

        `tflops_here`: of one process, with all of them at work."""
        scale = tflops_here / self.tflops * per_node * 1e9
        return self.inter_gbit * scale, self.intra_gbit * scale


def preset_named(name: str) -> Preset:
    """Raises BadInput for an unknown name."""
    known = yaml.safe_load(PATH.read_text(encoding="utf-8"))
    if name not in known:
        raise BadInput(Problem("preset", f"preset={name} is not known", f"use preset={'|'.join(sorted(known))}"))
    values = known[name]
    tflops, inter, intra = (float(values[key]) for key in ("tflops", "inter_gbit", "intra_gbit"))
    return Preset(name, tflops, inter, intra, str(values["source"]))
