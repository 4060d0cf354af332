"""The energy counters of Intel's and AMD's processors (RAPL), where Linux shows them. Torch is not imported.

A counter is of a whole package, with all that runs on it. Virtual machines seldom have it, and since 2020 only root may
read it.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path("/sys/class/powercap")


class Counters:
    """The packages that can be read; none of them on most machines. `root`: the folder of Linux's power capping."""

    def __init__(self, root: Path = ROOT) -> None:
        self.packages = []
        for folder in sorted(root.glob("intel-rapl:*")):
            if folder.name.count(":") == 1 and self._read(folder / "energy_uj") is not None:  # no part of a package
                self.packages.append(folder)

    def read(self) -> list[int]:
        """Microjoules of each package. Only differences mean something."""
        return [self._read(folder / "energy_uj") or 0 for folder in self.packages]

    def joules(self, before: list[int], after: list[int]) -> float | None:
        """The energy between two readings, in which a counter may have begun anew once. None without a counter."""
        if not self.packages:
            return None
        total = 0
        for folder, first, last in zip(self.packages, before, after, strict=True):
            most = self._read(folder / "max_energy_range_uj") or 0
            total += last - first + (most if last < first else 0)
        return total / 1e6

    @staticmethod
    def _read(file: Path) -> int | None:
        try:
            return int(file.read_text())
        except (OSError, ValueError):
            return None
