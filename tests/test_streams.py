"""Standard streams that are closed, full, or without a reader: no tool ends with a traceback because of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}


TOOLS = {
    "-m launch.explain strategy=tp nproc=4": 0,
    "-m launch.explain strategy=single nproc=4": 2,
    "-m launch.local --help": 0,
    "train/main.py --cfg job": 0,
    "scripts/benching/points.py list 2": 0,
    "scripts/chat.py --help": 0,
    "scripts/compress.py --help": 0,
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("line", TOOLS)
def test_a_pipe_closed_early_ends_no_tool_in_a_traceback(line, tmp_path):
    first, *words = line.split()
    command = [sys.executable, str(REPO / first) if "/" in first else first, *words]
    read, write = os.pipe()
    os.close(read)
    run = subprocess.run(command, cwd=tmp_path, env=ENV, stdout=write, stderr=subprocess.PIPE, timeout=50)
    os.close(write)
    assert (run.returncode, run.stderr) == (TOOLS[line], b"")


STREAM = """
import sys
from train.command.process.streams import lasting
lasting()
for _ in range(3): print("x" * 100_000, "caf\\u00e9")
print("still here", file=sys.stderr)
sys.exit(5)
"""


@pytest.mark.timeout(60)
@pytest.mark.parametrize("output", ["| true", ">&-", ">/dev/full", "<&- >&- 2>&-", "2>&1 | true", "> out"])
def test_a_broken_standard_output_ends_nothing(output, tmp_path):
    (tmp_path / "code.py").write_text(STREAM)
    line = f"{sys.executable} code.py {output}; exit ${{PIPESTATUS[0]}}"
    env = ENV | {"PYTHONIOENCODING": "ascii"}
    run = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=50)
    assert run.returncode == 5
    assert run.stderr == ("" if "2>&" in output else "still here\n")
    if output == "> out":
        assert (tmp_path / "out").read_text().count("caf\\xe9") == 3
