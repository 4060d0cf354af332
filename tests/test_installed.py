"""The program installed as a wheel in a separate environment, and used from another folder; its command."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from launch.console import HELP, MODULES

REPO = Path(__file__).resolve().parent.parent
PACKAGES = ("train", "launch", "scripts")
OF_THE_REPOSITORY = {".sh", ".md"}  # endings of files that no code reads
SMALL = ("runtime.device=cpu", "model.num_layers=1", "train.seq_len=32", "train.micro_batch_size=4")
STEPS = ("train.steps=2", "train.eval_batches=1", "metrics.profile_every=0")
DRY = ("nproc=2", "strategy=dp", "dry_run=true")


def strategy_lab(*words):
    command = [sys.executable, "-c", "from launch.console import main; main()", *words]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=60)


@pytest.mark.timeout(120)
def test_the_command_lists_its_commands():
    alone, asked = strategy_lab(), strategy_lab("--help")
    assert (alone.returncode, alone.stdout, alone.stderr) == (0, HELP, "")
    assert (asked.returncode, asked.stdout, asked.stderr) == (0, HELP, "")
    assert [line.split()[0] for line in HELP.splitlines() if line.startswith("  ")] == [*MODULES]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["explian"], 2, "explian is not a command of strategy-lab: use strategy-lab explain"),
        (["strategy=tp"], 2, "strategy=tp is not a command of strategy-lab: use one of local, explain, plan, sweep"),
        (["explain", "strategy=pt"], 2, "strategy=pt does not name a preset"),
        (["explain", "strategy=tp", "data=text", "data.path=no/such"], 2, "no/such"),
        (["local", "metrics.dir=pyproject.toml/runs"], 3, "pyproject.toml/runs cannot be written"),
    ],
)
def test_a_command_keeps_the_exit_code_of_its_tool(words, code, says):
    run = strategy_lab(*words)
    assert (run.returncode, "Traceback" in run.stderr) == (code, False)
    assert says in run.stdout + run.stderr


def built(tree, wheels):
    """The wheel, built in a copy of this source tree, because a build leaves files behind."""
    for name in (*PACKAGES, "configs"):
        shutil.copytree(REPO / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, tree / name)
    pip("wheel", str(tree), "--no-build-isolation", "--wheel-dir", str(wheels))
    (wheel,) = wheels.iterdir()
    return wheel


def pip(*words):
    command = [sys.executable, "-m", "pip", *words, "--no-deps", "--no-index", "--quiet", "--disable-pip-version-check"]
    run = subprocess.run(command, env=outside(), capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr


def outside():
    """Environment variables without paths of the repository."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return built(tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheels"))


@pytest.fixture(scope="module")
def programs(wheel, tmp_path_factory):
    """The folder of the programs of an environment that holds the wheel. The other packages are those of this
    environment, but not what its .pth files add, which may be an editable installation of this repository."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=60)
    python = folder / "bin" / "python"
    asked = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(asked, check=True, capture_output=True, text=True, timeout=60).stdout.strip())
    (site / "present.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}) + "\n")
    pip("--python", str(python), "install", "--no-compile", str(wheel))
    return folder / "bin"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_wheel_holds_what_the_program_reads_and_nothing_else(wheel):
    files = [path.relative_to(REPO) for name in (*PACKAGES, "configs") for path in (REPO / name).rglob("*")
             if path.is_file() and path.suffix not in {*OF_THE_REPOSITORY, ".pyc"}]  # fmt: skip
    expected = {f"train/{file}" if file.parts[0] == "configs" else str(file) for file in files}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == expected
    assert {"train/configs/config.yaml", "train/main.py", "scripts/compare.py"} < held


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_installed_program_works_in_any_folder(programs, tmp_path):
    """As modules and as the command: each tool that is quick by both, and the others by one of them."""
    # a folder within a git repository of somebody else's, who has a train.py; `python -m` would take that for its own
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True, timeout=60)
    (theirs := tmp_path / "train.py").write_text("raise SystemExit('not the program')\n")

    def lab(*line, code=0):
        run = subprocess.run(line, cwd=tmp_path, env=outside(), capture_output=True, text=True, timeout=200)
        assert run.returncode == code, run.stdout[-3000:] + run.stderr[-3000:]
        return run.stdout

    def command(name, *words, **options):
        return lab(programs / "strategy-lab", name, *words, **options)

    def module(name, *words, **options):
        return lab(programs / "python", "-m", MODULES[name], *words, **options)

    printed = command("local", "nproc=2", "strategy=dp", *SMALL, *STEPS)
    (main,) = (word for word in printed.splitlines()[0].split() if word.endswith("train/main.py"))
    assert Path(main).is_relative_to(programs.parent), "the ranks run what is installed"
    (run,) = (tmp_path / "runs").iterdir()
    facts = json.loads((run / "work.json").read_text())
    assert facts["commit"] == "", "the commit of the folder would be wrong"
    assert facts["command"].startswith("torchrun --nproc_per_node=2 -m train.main strategy=dp ")
    explained(command)
    assert "dp" in command("compare", "runs", "--html", "report.html")
    assert "uPlot" in (tmp_path / "report.html").read_text()
    theirs.unlink()
    explained(module)
    assert module("local", *DRY) == command("local", *DRY)
    assert "equals one device" in module("verify", "nproc=2", "strategy=dp", *SMALL)
    assert "dp" in module("compare", "runs")


def explained(way):
    assert "model tiny" in way("explain", "strategy=tp", "nproc=2", "hardware=h100_sxm")
    way("explain", "strategy=tp", "nproc=3", code=2)
