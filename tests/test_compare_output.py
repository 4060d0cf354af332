"""What scripts/compare.py prints and writes: formats, order, its report, and one line if it fails."""

import csv
import io
import json
import re
import subprocess
import sys

import pytest

from tests.synthetic_runs import make_run
from tests.test_compare import COMPARE, OTHER, compare


def test_formats_and_order(tmp_path):
    for strategy, ms in (("dp", 100.0), ("tp", 300.0), ("pp", 200.0)):
        make_run(tmp_path, strategy, ms=ms, pipeline=strategy == "pp")
    rows = json.loads(compare(tmp_path, "--json"))
    assert [row["strategy"] for row in rows] == ["dp", "pp", "tp"], "most tokens/s first"
    assert [row["bubble_pct"] for row in rows] == [None, 25.0, None]
    table_of = list(csv.DictReader(io.StringIO(compare(tmp_path, "--csv", "--sort", "step_ms_p95"))))
    assert [row["strategy"] for row in table_of] == ["dp", "pp", "tp"], "fewest ms first"
    assert float(table_of[1]["tokens_per_s"]) == rows[1]["tokens_per_s"] and table_of[0]["bubble_pct"] == "-"
    by_bubble = json.loads(compare(tmp_path, "--json", "--sort", "bubble_pct"))
    assert by_bubble[0]["strategy"] == "pp", "unknown last"
    lines = [line for line in compare(tmp_path, "--md").splitlines() if line.startswith("|")]
    assert len(lines) == 5 and len({line.count(" | ") for line in lines}) == 1


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    assert compare(tmp_path, code=2) == (
        f"compare: no run in {tmp_path}: name a folder that contains metrics.jsonl, or a folder of such folders\n"
    )
    make_run(tmp_path, "tp")
    message = compare(tmp_path, "--sort", "beauty", code=2)
    assert message.startswith("compare: --sort beauty is not a column: use one of ") and message.count("\n") == 1


def test_torch_and_matplotlib_are_not_loaded_for_a_table(tmp_path):
    make_run(tmp_path, "tp")
    code = (
        f"import runpy, sys\nsys.argv = ['', {str(tmp_path)!r}]\nsys.path.insert(0, {str(COMPARE.parent)!r})\n"
        f"runpy.run_path({str(COMPARE)!r}, run_name='__main__')\n"
        "assert not {'torch', 'matplotlib', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)


def test_missing_matplotlib_is_one_line(tmp_path):
    make_run(tmp_path, "tp")
    code = (
        f"import runpy, sys\nsys.modules['matplotlib'] = None\nsys.path.insert(0, {str(COMPARE.parent)!r})\n"
        f"sys.argv = ['', {str(tmp_path)!r}, '--png', {str(tmp_path)!r}]\n"
        f"runpy.run_path({str(COMPARE)!r}, run_name='__main__')"
    )
    run = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True)
    assert run.returncode == 3 and run.stderr.count("\n") == 1
    assert "pip install 'strategy-lab[plot]'" in run.stderr


@pytest.mark.parametrize("samples", [True, False])
def test_report_is_one_file_that_needs_no_other(tmp_path, samples):
    for strategy in ("dp", "tp", "pp"):
        make_run(tmp_path / "runs", strategy, samples=samples and strategy != "tp", pipeline=strategy == "pp", off=1e-7)
    make_run(tmp_path / "runs", "fsdp", samples=False, finished=False, steps=3)
    make_run(tmp_path / "runs", "dp", work=OTHER, name="dp-other", samples=samples)
    compare(tmp_path / "runs", "--html", tmp_path / "report.html", "--png", tmp_path / "png")
    page = (tmp_path / "report.html").read_text()
    # test_report.py looks at scripts and styles
    bare = re.sub(r"<script>.*?</script>|<style>.*?</style>", "", page, flags=re.DOTALL)
    assert not re.search(r"https?:|src=|@import|<link|url\((?!#)|href=\"(?!#)", bare)
    assert "running or stopped at step 3" in page and "model.num_layers 4, not 2" in page
    ids = re.findall(r'\bid="([^"]*)"', bare)
    assert len(ids) == len(set(ids)), "pictures must not share ids"
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', bare)) <= set(ids)
    names = {path.stem for path in (tmp_path / "png").iterdir()}
    assert names >= {"throughput", "memory", "wire", "loss", "throughput-2"}
    assert ({"step-time", "timeline-pp"} <= names) is samples
    assert bare.count('<svg role="img"') == len(names)
