"""The versions of Python and of the packages, and versions that are known not to work, each with its reason.

Nothing is imported to learn its version, so a broken package does no harm here.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launch.examine.finding import Finding, Level, error, ok, warning
from train.command.resources import INSTALLED, ROOT

if TYPE_CHECKING:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

SUBJECT = "packages"
NAME = "strategy-lab"
NO_PKG_RESOURCES = 82  # the version of setuptools that no longer has the module pkg_resources
OTHERS = ("setuptools", "ninja")  # of which versions are shown too, as pairs depend on them


@dataclass(frozen=True)
class Known:
    """What happens with a version outside the range that pyproject.toml gives."""

    level: Level
    reason: str


UNTRIED = Known(Level.WARNING, "the lab was not tried with it")
KNOWN = {
    "torch": Known(Level.ERROR, "the lab calls parts of torch that differ between versions, and was tried on these"),
    "hydra-core": Known(Level.ERROR, "older ones let a config run code, and newer ones were not tried"),
    "omegaconf": Known(Level.ERROR, "hydra-core 1.3 needs this range"),
    "tensorboard": Known(Level.WARNING, "older versions need the module pkg_resources"),
}


@dataclass(frozen=True)
class Required:
    """The ranges of versions in pyproject.toml. `optional`: packages that only some runs need."""

    python: SpecifierSet
    packages: tuple[Requirement, ...]
    optional: tuple[Requirement, ...]


@dataclass(frozen=True)
class Installed:
    """`versions` by package. `programs`: the programs of `PROGRAMS` that are found."""

    python: str
    versions: Mapping[str, str]
    programs: frozenset[str]


def required() -> Required:
    """From pyproject.toml in the source tree, else from what the installation keeps of it."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    if INSTALLED:
        python = importlib.metadata.metadata(NAME)["Requires-Python"]
        lines = importlib.metadata.requires(NAME) or []
    else:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        python, lines = project["requires-python"], list(project["dependencies"])
        for extra, more in project["optional-dependencies"].items():
            lines += [f'{line}; extra == "{extra}"' for line in more]
    packages = [Requirement(line) for line in lines]
    # what developers need does not decide whether a run starts
    optional = [one for one in packages if one.marker and not one.marker.evaluate({"extra": "dev"})]
    return Required(SpecifierSet(python), tuple(one for one in packages if not one.marker), tuple(optional))


def installed(needs: Required, env: Mapping[str, str]) -> Installed:
    """What this Python finds. `env` may name the compiler, as CXX."""
    names = [*(one.name for one in (*needs.packages, *needs.optional)), *OTHERS]
    versions = {}
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name) or "unknown"
    programs = {"ninja": "ninja", "compiler": env.get("CXX") or "c++"}
    path = env.get("PATH", os.defpath)
    found = frozenset(what for what, program in programs.items() if shutil.which(program, path=path))
    return Installed(platform.python_version(), versions, found)


def judge(needs: Required, here: Installed) -> list[Finding]:
    """One finding for each version that is wrong or missing and for each known-bad pair, and one with all versions."""
    wrong = [*_python(needs, here)]
    for one in needs.packages:
        wrong += _package(one, here, needed=True)
    for one in needs.optional:
        wrong += _package(one, here, needed=False)
    wrong += _pairs(here)
    shown = ", ".join(f"{name} {version}" for name, version in here.versions.items())
    return [ok(SUBJECT, f"Python {here.python}, {shown}", python=here.python, versions=dict(here.versions)), *wrong]


def _python(needs: Required, here: Installed) -> Sequence[Finding]:
    if _fits(here.python, needs.python):
        return ()
    fix = f"make an environment with another Python: python3.X -m venv .venv, with a version {needs.python}"
    return (error(SUBJECT, f"this is Python {here.python}, but the lab needs Python {needs.python}", fix),)


def _package(need: Requirement, here: Installed, *, needed: bool) -> Sequence[Finding]:
    name, version = need.name, here.versions.get(need.name)
    fix = f'python -m pip install "{name}{need.specifier}"'
    if version is None:
        return (error(SUBJECT, f"{name} is not installed, and every run needs it", fix),) if needed else ()
    if _fits(version, need.specifier):
        return ()
    known = KNOWN.get(name, UNTRIED)
    message = f"{name} {version} is installed, but the lab needs {name}{need.specifier}: {known.reason}"
    return (Finding(SUBJECT, known.level, message, fix),)


def _pairs(here: Installed) -> list[Finding]:
    """Packages that are each right but do not work together, or not on this machine."""
    found = []
    board, tools = (here.versions.get(name) for name in ("tensorboard", "setuptools"))
    if board and tools and _release(board) < (2, 21) and _release(tools) >= (NO_PKG_RESOURCES,):
        message = f"tensorboard {board} needs pkg_resources, which setuptools {tools} no longer has: it does not start"
        found.append(warning(SUBJECT, message, 'python -m pip install "tensorboard>=2.21"'))
    if "compiler" not in here.programs:
        message = "no C++ compiler is found, and compile.enabled=true needs one on a CPU"
        found.append(warning(SUBJECT, message, "install g++ or clang, or name a compiler in CXX"))
    if "deepspeed" in here.versions and not {"ninja", "compiler"} <= here.programs:
        lacks = " and no ".join(what for what in ("ninja", "compiler") if what not in here.programs)
        message = f"deepspeed is installed, but no {lacks}: an operator that it has to compile cannot be made"
        fix = "install them (python -m pip install ninja); the lab's ds_ presets compile none themselves"
        found.append(warning(SUBJECT, message, fix))
    return found


def _release(version: str) -> tuple[int, ...]:
    from packaging.version import InvalidVersion, Version

    try:
        return Version(version).release
    except InvalidVersion:
        return ()


def _fits(version: str, wanted: SpecifierSet) -> bool:
    """Whether the version is in the range. Builds of a version count as this version: 2.11.0a0+git1 as 2.11.0."""
    return wanted.contains(".".join(map(str, _release(version))) or "0")
