"""The rows of a file of published runs, and which of them are scored. No measured column decides that.

A cell that cannot be what its column says, such as a count of 0 or `many`, makes no error: its row counts as one that
is not predicted.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from train.command.planning.intervals import NODE, regimes
from train.config.fields import (
    MAX_COLUMNS,
    MAX_LAYERS,
    MAX_RANKS,
    MAX_SEQUENCES,
    MAX_TOKENS,
    MAX_VOCABULARY,
    MAX_WIDTH,
)
from train.config.problems import BadInput, Problem

# the largest value of each count, which is that of the lab's own key
COUNTS = {
    "n_gpus": MAX_RANKS, "n_layers": MAX_LAYERS, "d_model": MAX_WIDTH, "n_heads": MAX_WIDTH, "n_kv_heads": MAX_WIDTH,
    "d_ff": MAX_COLUMNS, "seq_len": MAX_TOKENS, "global_batch_seqs": MAX_SEQUENCES, "micro_batch": MAX_SEQUENCES,
    "dp": MAX_RANKS, "tp": MAX_RANKS, "pp": MAX_RANKS, "cp": MAX_RANKS,
}  # fmt: skip
NEEDED = ("gpu", "ffn_type", *COUNTS)
MAY_BE_BLANK = {"vocab": MAX_VOCABULARY, "virtual_stages": MAX_LAYERS, "gpus_per_node": MAX_RANKS}
SPEED, PEAK = "derived_tokens_per_s_per_gpu", "measured_peak_mem_gib"
READ = (
    *NEEDED, *MAY_BE_BLANK, "source", "row_id", "tier", "is_moe", "duplicate_of", "notes", "model_name", "n_params",
    "interconnect", "zero_or_fsdp", "sp", "pp_schedule", "activation_ckpt", "precision", SPEED, PEAK,
)  # fmt: skip
NOT_READ = (
    "grad_accum", "ep", "compile", "measured_tokens_per_s_per_gpu", "measured_tflops_per_gpu", "measured_mfu_pct",
    "measured_step_s", "flops_convention", "calc_model_tflops_full_attn", "calc_model_tflops_causal_attn",
)  # fmt: skip
FINE_TUNED = ("LoRA", "SFT")
NO = ("", "0", "0.0", "no", "false")
# the precision of a run by what its cell has in it, the first that matches
PRECISIONS = {"fp4": "nvfp4", "fp8": "fp8", "bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16"}
MIXTURE = "MoE"  # a regime
# Repositories of one vendor are near-copies of each other, so they count as one source: the first part that matches.
VENDORS = {"NVIDIA": ("NVIDIA/", "NVIDIA-NeMo/", "docs.nvidia.com")}


@dataclass(frozen=True)
class Row:
    """One published run. `source`, `row_id`, `notes` and `model_name` only name it and group it."""

    cells: Mapping[str, str]

    def number(self, name: str) -> float | None:
        """A finite number; None if the cell is blank or has anything else."""
        try:
            found = float(self.cells[name])
        except ValueError:
            return None
        return found if math.isfinite(found) else None

    def count(self, name: str, default: int = 1) -> int:
        found = self.number(name)
        return default if found is None else int(found)

    def says_no(self, name: str) -> bool:
        return self.cells[name].lower() in NO

    @cached_property
    def is_sound(self) -> bool:
        """Whether every count is a whole number in its range."""
        filled = {name: most for name, most in (COUNTS | MAY_BE_BLANK).items() if name in COUNTS or self.cells[name]}
        numbers = [(self.number(name), most) for name, most in filled.items()]
        return all(found is not None and found.is_integer() and 1 <= found <= most for found, most in numbers)

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
        """Tokens per second and device; None if the cell is not a positive number."""
        return self._measured(SPEED)

    @property
    def peak_gib(self) -> float | None:
        """The peak of memory on a device in GiB; None if the cell is not a positive number."""
        return self._measured(PEAK)

    def _measured(self, name: str) -> float | None:
        found = self.number(name)
        return found if found is not None and found > 0 else None

    @cached_property
    def precision(self) -> str:
        text = self.cells["precision"].lower()
        return next((kind for part, kind in PRECISIONS.items() if part in text), text)

    @property
    def is_moe(self) -> bool:
        return not self.says_no("is_moe")

    @cached_property
    def defaulted(self) -> bool:
        """Whether a cell that the prediction reads is blank."""
        needed = ["vocab", "activation_ckpt", "precision", "zero_or_fsdp"]
        needed += ["sp"] if self.count("tp") > 1 else []
        needed += ["pp_schedule", "virtual_stages"] if self.count("pp") > 1 else []
        needed += ["interconnect", "gpus_per_node"] if self.count("n_gpus") > NODE else []
        return any(not self.cells[name] for name in needed)

    @property
    def family(self) -> tuple[str, ...]:
        """Rows of a family differ only in their layout."""
        model = ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_ff", "ffn_type", "is_moe")
        names = ("source", "gpu", "n_gpus", *model, "seq_len", "global_batch_seqs", "precision")
        return tuple(self.cells[name] for name in names)

    @property
    def layout(self) -> tuple[str, ...]:
        names = ("dp", "tp", "pp", "cp", "micro_batch", "zero_or_fsdp", "sp", "pp_schedule", "virtual_stages")
        return tuple(self.cells[name] for name in (*names, "activation_ckpt"))

    @cached_property
    def regimes(self) -> list[str]:
        if self.is_moe:
            return [MIXTURE]
        split = self.count("tp") > 1 or self.count("pp") > 1
        return regimes(self.count("n_gpus"), splits_model=split, cp=self.count("cp"), precision=self.precision)

    @cached_property
    def in_bar(self) -> bool:
        """Whether the row counts for the accuracy that is promised: a dense model, A100 or H100, 16 bits or precision
        not stated."""
        gpu = self.cells["gpu"]
        return not self.is_moe and self.precision in ("", "bf16") and ("A100" in gpu or "H100" in gpu)


def read(path: Path) -> list[Row]:
    """The rows that are modelled. Raises BadInput if the file has other columns, or no such row."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            wrong = "; ".join(wrong_columns(reader.fieldnames or ()))
            rows = [] if wrong else [Row(cells) for row in reader if modelled(cells := cleaned(row))]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _refused(f"{path} cannot be read ({error})") from error
    if wrong:
        raise _refused(f"{path} has {wrong}")
    if not rows:
        raise _refused(f"{path} has no row of a model that is trained from scratch, with all of {', '.join(NEEDED)}")
    return rows


def wrong_columns(names: Iterable[str]) -> Iterator[str]:
    found = [*names]
    if missing := [name for name in READ if name not in found]:
        yield f"no column {', '.join(missing)}"
    if unknown := [name for name in found if name not in (*READ, *NOT_READ)]:
        yield f"the unknown column {', '.join(map(repr, unknown))}"


def cleaned(row: Mapping[str, str]) -> dict[str, str]:
    """The cells that are read. `nan`, which some programs write for a blank cell, is one."""
    cells = {name: row[name].strip() for name in READ}
    return {name: "" if text.lower() == "nan" else text for name, text in cells.items()}


def modelled(cells: Mapping[str, str]) -> bool:
    """The rule: tier A or B, no duplicate, no fine-tuning, and every needed cell filled in."""
    text = cells["notes"] + cells["model_name"]
    return (
        cells["tier"] in ("A", "B")
        and not cells["duplicate_of"]
        and not any(word in text for word in FINE_TUNED)
        and all(cells[name] for name in NEEDED)
    )


def _refused(message: str) -> BadInput:
    fix = "give a file with the columns of docs/data/published_runs.csv"
    return BadInput(Problem("published runs", message, fix))
