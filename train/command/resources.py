"""Where the files of this program are: in its source tree, or in the environment that it is installed in.

A wheel holds the folder `configs` as `train/configs`: a folder `configs` of its own, beside all other installed
packages, could be overwritten by one of them. `pyproject.toml` says so to setuptools. An editable installation runs
from the source tree. Torch is not imported.
"""

from __future__ import annotations

from pathlib import Path

TRAIN = Path(__file__).resolve().parents[1]
ROOT = TRAIN.parent  # the folder of train, launch and scripts: the source tree, or site-packages
INSTALLED = (TRAIN / "configs").is_dir()
CONFIG_DIR = (TRAIN if INSTALLED else ROOT) / "configs"


def shortest(path: Path) -> str:
    """The path of one of this program's files, as short as it can be typed in the working directory."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def words_of(script: str) -> list[str]:
    """A script as a command line that is kept names it after `python` or `torchrun`: the path within the source tree,
    or the module where the program is installed. Neither is a path of this machine."""
    return ["-m", script.removesuffix(".py").replace("/", ".")] if INSTALLED else [script]
