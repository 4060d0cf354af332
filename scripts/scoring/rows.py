"""The rows of a file of published runs, and which of them are scored. No measured column decides that."""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from train.command.planning.intervals import regimes
from train.config.problems import BadInput, Problem

NEEDED = (
    "gpu", "n_gpus", "n_layers", "d_model", "n_heads", "n_kv_heads", "d_ff", "ffn_type", "seq_len", "global_batch_seqs",
    "micro_batch", "dp", "tp", "pp", "cp",
)  # fmt: skip
READ = (
    *NEEDED, "source", "row_id", "tier", "is_moe", "duplicate_of", "notes", "model_name", "interconnect", "vocab",
    "zero_or_fsdp", "sp", "pp_schedule", "virtual_stages", "activation_ckpt", "precision",
    "derived_tokens_per_s_per_gpu", "measured_peak_mem_gib",
)  # fmt: skip
NUMBERS = (*(name for name in NEEDED if name not in ("gpu", "ffn_type")), "vocab", "virtual_stages", *READ[-2:])
NUMBER = re.compile(r"(\d+(\.\d*)?)?")
DEFAULTED = ("vocab", "sp", "pp_schedule", "virtual_stages", "activation_ckpt", "precision", "zero_or_fsdp")
FINE_TUNED = ("LoRA", "SFT")
# Repositories of one vendor are near-copies of each other, so they count as one source: the first part that matches.
VENDORS = {"NVIDIA": ("NVIDIA/", "NVIDIA-NeMo/", "docs.nvidia.com")}


@dataclass(frozen=True)
class Row:
    """One published run. `source`, `row_id`, `notes` and `model_name` only name it and group it."""

    cells: Mapping[str, str]

    def number(self, name: str, default: float = 0) -> float:
        return float(self.cells[name]) if self.cells[name] else default

    def count(self, name: str, default: int = 1) -> int:
        return int(self.number(name, default))

    @cached_property
    def source(self) -> str:
        """The source as one that can be held out: the vendor, or the repository or paper without the section."""
        text = self.cells["source"]
        for vendor, parts in VENDORS.items():
            if any(part in text for part in parts):
                return vendor
        return text.partition("@")[0].partition(" Table")[0].strip()

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second and device."""
        return self.number("derived_tokens_per_s_per_gpu") or None

    @property
    def peak_gib(self) -> float | None:
        """The peak of memory on a device in GiB."""
        return self.number("measured_peak_mem_gib") or None

    @property
    def defaulted(self) -> bool:
        """Whether a cell that the prediction reads is blank."""
        needed = [name for name in DEFAULTED if name not in ("pp_schedule", "virtual_stages") or self.count("pp") > 1]
        needed = [name for name in needed if name != "sp" or self.count("tp") > 1]
        return any(not self.cells[name] for name in needed)

    @property
    def family(self) -> tuple[str, ...]:
        """Rows of a family differ only in their layout."""
        names = ("source", "gpu", "n_gpus", "n_layers", "d_model", "n_heads", "n_kv_heads", "d_ff", "seq_len")
        return tuple(self.cells[name] for name in (*names, "global_batch_seqs", "precision"))

    @property
    def layout(self) -> tuple[str, ...]:
        names = ("dp", "tp", "pp", "cp", "micro_batch", "zero_or_fsdp", "sp", "pp_schedule", "virtual_stages")
        return tuple(self.cells[name] for name in (*names, "activation_ckpt"))

    @property
    def regimes(self) -> list[str]:
        split = self.count("tp") > 1 or self.count("pp") > 1
        precision = self.cells["precision"]
        return regimes(self.count("n_gpus"), splits_model=split, cp=self.count("cp"), precision=precision)

    @property
    def in_bar(self) -> bool:
        """Whether the row counts for the accuracy that is promised: A100 and H100, 16-bit or not stated."""
        gpu = self.cells["gpu"]
        return self.cells["precision"] in ("", "bf16") and ("A100" in gpu or "H100" in gpu)


def read(path: Path) -> list[Row]:
    """The rows that are modelled. Raises BadInput if the file has not the columns that are read."""
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in READ if name not in (reader.fieldnames or ())]
            cells = list(reader) if not missing else []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _refused(f"{path} cannot be read: {error}") from error
    if missing:
        raise _refused(f"{path} has no column {', '.join(missing)}")
    rows = [Row(row) for row in cells if modelled(row)]
    for row, name in itertools.product(rows, NUMBERS):
        if not NUMBER.fullmatch(row.cells[name]):
            raise _refused(f"{path}, row {row.cells['row_id']}: {name}={row.cells[name]} is not a number")
    return rows


def modelled(cells: Mapping[str, str]) -> bool:
    """The rule: tier A or B, no duplicate, no fine-tuning, dense, and every needed cell filled in."""
    text = cells["notes"] + cells["model_name"]
    return (
        cells["tier"] in ("A", "B")
        and not cells["duplicate_of"]
        and cells["is_moe"] in ("", "0")
        and not any(word in text for word in FINE_TUNED)
        and all(cells[name] for name in NEEDED)
    )


def _refused(message: str) -> BadInput:
    fix = "give a file with the columns of docs/data/published_runs.csv"
    return BadInput(Problem("published runs", message, fix))
