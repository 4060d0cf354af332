"""A rank of the world in which plants are tried with spmd_types. `python -m tests.typed` starts it."""

import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import spmd_types as spmd
import torch
from spmd_types.checker import typecheck
from torch.distributed.device_mesh import DeviceMesh

from tests import planted
from tests.typed import lab
from tests.typed.programs import PROGRAMS
from tests.worker import BUGS, on_all_ranks
from train.proof import jobs

ROOT = Path(__file__).resolve().parents[2]


def run(job: jobs.Job, site: jobs.Site) -> jobs.Result:
    """Collective. `said`: the type error, or empty. `line`: where it is. `acted`: whether the plant changed numbers
    (a program), or its line ran (in the lab's code)."""
    kind, name = job.name.split()[:2]
    mesh = site.mesh(job.config)
    if kind == "PROGRAM":
        return program(name, mesh)
    counter = planted.Counter()
    with BUGS[name](counter) if kind == "BUG" else nullcontext():
        result = _tried(lambda: lab.step(job.config, mesh))
    return result | {"acted": on_all_ranks(counter, site) > 0}


def program(name: str, mesh: DeviceMesh) -> jobs.Result:
    """Both forms, with and without types, and with types that also say which dimension is split ("global")."""
    group = mesh["tp"].get_group()
    right, wrong = (PROGRAMS[name](group, is_wrong) for is_wrong in (False, True))
    differs = torch.tensor(float((right - wrong).abs().max()))
    torch.distributed.all_reduce(differs)

    def typed(is_wrong: bool, local: bool) -> jobs.Result:
        with spmd.set_current_mesh(mesh), typecheck(local=local):
            return _tried(lambda: PROGRAMS[name](group, is_wrong))

    return typed(True, True) | {
        "acted": bool(differs > 0),
        "right": typed(False, True)["said"],
        "global": typed(True, False)["said"],
        "global_right": typed(False, False)["said"],
    }


def _tried(act: Callable[[], object]) -> jobs.Result:
    """The type error that `act` ends with, and the last line of this repository on the way to it."""
    try:
        act()
    except spmd.SpmdTypeError as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(ROOT)]
        last = frames[-1]
        return {"said": str(error), "line": f"{Path(last.filename).relative_to(ROOT)}:{last.lineno} {last.line}"}
    return {"said": "", "line": ""}
