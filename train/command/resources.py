"""Where the files of this program are: in its source tree, or in the environment where it is installed.

In a wheel the folder `configs` is `train/configs`, as another installed package could overwrite a top-level folder
`configs`. `pyproject.toml` configures this. An editable installation runs from the source tree. Torch is not imported.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

TRAIN = Path(__file__).resolve().parents[1]
ROOT = TRAIN.parent  # the folder of train, launch and scripts: the source tree, or site-packages
INSTALLED = (TRAIN / "configs").is_dir()
CONFIG_DIR = (TRAIN if INSTALLED else ROOT) / "configs"


def path_of(script: str) -> str:
    """The path of one of this program's scripts: relative if it is below the working directory."""
    path, here = ROOT / script, Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def words_of(script: str) -> list[str]:
    """The words for a script after `python` or `torchrun` in a command line that is recorded: its path in the source
    tree, or `-m` and its module if the program is installed. Neither contains a path of this machine."""
    return ["-m", script.removesuffix(".py").replace("/", ".")] if INSTALLED else [script]


def source_commit() -> str:
    """The commit of this source tree, with + if files have changed since. It is empty if the program's folder is not
    the root of a git repository: a repository around it, for example around a virtual environment, has other commits.
    """
    if not (ROOT / ".git").exists():
        return ""
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--abbrev=10", "--dirty=+", "--exclude=*"],
            cwd=ROOT, capture_output=True, text=True, timeout=5, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip()
