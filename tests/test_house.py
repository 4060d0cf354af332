"""The structure of the repository: some modules must not import torch, and folders and files have size limits.

The contracts between folders are in pyproject.toml, [tool.importlinter]; `make check` runs them.
"""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
CODE = ("train", "launch", "scripts")
MOST_ENTRIES, MOST_FILES, MOST_LINES = 12, 12, 250
LOADS_TORCH = re.compile(r"^(import|from) torch\b", re.MULTILINE)
IMPORT_ALL = """
import importlib, sys

class NoTorch:  # the traceback ends at the line that imports it
    def find_spec(self, name, path=None, target=None):
        assert name != "torch", "torch is loaded"

sys.meta_path.insert(0, NoTorch())
for name in sys.argv[1:]:
    importlib.import_module(name)
    assert "torch" not in sys.modules, name
"""


def python_files(*folders):
    return [path for folder in folders for path in sorted((REPO / folder).rglob("*.py"))]


def torch_free():
    """The files of the modules that are named in the contract in pyproject.toml."""
    contracts = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (contract,) = [one for one in contracts if one.get("forbidden_modules") == ["torch"]]
    paths = [name.replace(".", "/") for name in contract["source_modules"]]
    return {file for path in paths for end in (".py", "/**/*.py") for file in REPO.glob(path + end)}


@pytest.mark.timeout(100)
def test_what_is_torch_free_does_not_load_torch():
    names = [".".join(file.relative_to(REPO).with_suffix("").parts) for file in sorted(torch_free())]
    assert len(names) > 80
    env = os.environ | {"PYTHONPATH": str(REPO)}
    run = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *names], env=env, capture_output=True, text=True, timeout=90
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("folder", ["train/strategies", "scripts"])
def test_a_module_loads_torch_or_is_named_as_torch_free(folder):
    """In folders with both kinds of modules, a new one must be named in the contract, or import torch at its top."""
    others = set(python_files(folder)) - torch_free()
    unknown = [file for file in others if file.name != "__init__.py" and not LOADS_TORCH.search(file.read_text())]
    assert not unknown, "name them in pyproject.toml, among the modules of the contract that forbids torch"


def test_the_top_of_train_can_be_taken_in_at_a_glance():
    names = [path.name for path in (REPO / "train").iterdir() if not path.name.startswith("__")]
    assert len(names) <= MOST_ENTRIES, names


def test_no_folder_holds_too_many_files():
    folders = {file.parent for file in python_files(*CODE)}
    sizes = {str(path.relative_to(REPO)): len(list(path.glob("[!_]*.py"))) for path in folders}
    assert not {path: size for path, size in sizes.items() if size > MOST_FILES}, "__init__.py is not counted"


def test_no_file_is_too_long():
    lines = {str(file.relative_to(REPO)): file.read_text().count("\n") for file in python_files(*CODE, "tests")}
    assert not {path: count for path, count in lines.items() if count > MOST_LINES}
