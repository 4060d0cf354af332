"""A program of torch.export, whose file is a zip archive that torch reads with pickle in some places.

Those places are refused before torch sees the file: sample inputs, weights and constants that are pickled, and the
formats of older versions. What is left are plain bytes of tensors and JSON. Of the JSON's names torch makes Python
code, and it evaluates its expressions, so that those which are more than arithmetic with sizes are refused too.
"""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from scripts.exporting.artefact import Artefact
from scripts.exporting.running.slots import Slotted
from scripts.exporting.running.torched import graph_of

SAMPLES = re.compile(r"data/sample_inputs/\w+\.pt")
PLAIN = re.compile(
    r"data/weights/weight_\d+|data/constants/tensor_\d+|data/(weights|constants)/\w+_config\.json|models/\w+\.json"
    r"|extra/[\w.]+|archive_format|archive_version|byteorder|\.data/(version|serialization_id|alignment)"
)
# calls of sympy's classes, which begin with a capital letter, with names, numbers and words in quotes
EXPRESSION = re.compile(r"(?:[A-Z]\w*\(|[A-Za-z]\w*(?![\w(])|'\w*'|\d+|[ ,)=<>+*/-])*", re.ASCII)
WORD = re.compile(r"[A-Za-z_][\w.]*", re.ASCII)
MOST_BYTES = 256 * 2**20  # of a JSON file


class Refused(ValueError):
    """The file is not what this program writes."""


class Runner(Slotted):
    def __init__(self, folder: Path, artefact: Artefact, threads: int) -> None:
        torch.set_num_threads(threads)
        path = folder / artefact.target.file
        refuse_pickles(path)
        program = torch.export.load(path).module()
        super().__init__(graph_of(program), artefact.shape, batched=True)


def refuse_pickles(path: Path) -> None:
    """Raises Refused for a file from which torch would unpickle anything."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            name = entry.filename.partition("/")[2]
            if SAMPLES.fullmatch(name):
                if entry.file_size:
                    raise Refused(f"{name} is a pickle, which could run any code")
            elif not PLAIN.fullmatch(name):
                raise Refused(f"{name} is not part of a program with plain weights")
            elif name.endswith(".json"):
                if entry.file_size > MOST_BYTES:
                    raise Refused(f"{name} is larger than {MOST_BYTES:,} bytes")
                _check(json.loads(archive.read(entry)), name)


def _check(value: Any, name: str) -> None:
    """Raises Refused for a pickled tensor, or a text that torch would make code of, anywhere in a JSON value."""
    if isinstance(value, list):
        for one in value:
            _check(one, name)
    elif isinstance(value, dict):
        if value.get("use_pickle"):
            raise Refused(f"{name} has a pickled tensor, which could run any code")
        for key, one in value.items():
            allowed = {"expr_str": EXPRESSION, "name": WORD, "target": WORD}.get(key)
            if allowed and isinstance(one, str) and one and (not allowed.fullmatch(one) or "__" in one):
                raise Refused(f"{name} has {key}={one[:40]!r}, which is no part of a graph of this program's")
            if key not in ("metadata", "module_call_graph"):  # notes for people, and the names of modules
                _check(one, name)
