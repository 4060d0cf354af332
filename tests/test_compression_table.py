"""The table of compressed runs, its Pareto front, the report, and what a study's bars say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import compress
from scripts.compressing import table
from scripts.compressing.record import COMPRESSION, Record
from scripts.compressing.studying import bars
from tests.compressions import other_loss, record, write
from tests.synthetic_runs import make_run
from train.config.problems import BadInput

COMPARE = Path(__file__).resolve().parent.parent / "scripts" / "compare.py"


def rows_of(*records):
    (made,) = table.tables(records)
    return {row.label: row for row in made.rows}


def test_the_front_has_what_nothing_beats_in_bytes_and_in_loss():
    rows = rows_of(
        record("int8_weight_only", 2.01, 260_000),
        record("int8_dynamic", 2.02, 260_100),  # as large, but for the name of its method, and worse
        record("nf4", 2.10, 150_000),
        record("8da4w", 2.05, 150_000),
        record("prune_2_4", 2.3, 530_000, score="wanda"),
    )
    assert {label for label, row in rows.items() if row.front} == {table.PARENT, "int8_weight_only", "8da4w"}
    assert [*rows] == [table.PARENT, "prune_2_4 score=wanda", "int8_dynamic", "int8_weight_only", "8da4w", "nf4"]


def test_seeds_are_one_row_and_costs_are_of_each_seeds_own_control():
    first = record("qat_8da4w", 2.02, control=2.0, retrain=5)
    other = record("qat_8da4w", 3.09, control=3.0, retrain=5, seed="b", before=other_loss(4.0))
    row = rows_of(first, other)["qat_8da4w retrain=5"]
    assert row.costs == pytest.approx((1.0, 3.0)) and row.mean("loss") == pytest.approx(2.555)
    assert row.ratio("decode_tokens_per_s") == 2.0
    assert table.COLUMNS["cost"](row) == "+2.00 % (+1.00 … +3.00)"
    assert rows_of(record("nf4", 2.1))["nf4"].costs == pytest.approx((5.0,)), "without a control: the parent's loss"


def test_another_device_has_a_table_of_its_own():
    assert len(table.tables([record(), record(device="NVIDIA H100")])) == 2


def test_the_table_is_printed_in_every_format(tmp_path, capsys):
    write(tmp_path / "runs" / "a-nf4", loss=2.1)
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / COMPRESSION).write_text('{"format": 1}')
    words = ["--table", str(tmp_path)]
    assert compress.main(words) == compress.main([*words, "--md"]) == 0
    out, err = capsys.readouterr()
    assert "| nf4 | 1 | 2.1000 | +5.00 % | 0.19 (20.0 %) | 0.38 | 500 (0.50 x) | 200 (2.00 x) | yes |" in out
    assert err.count("skipped: ") == 2 and "compression.json: method is None, not a text" in err
    assert compress.main([*words, "--json"]) == 0
    parent, row = json.loads(capsys.readouterr().out)
    assert (parent["method"], row["costs_pct"], row["front"]) == (table.PARENT, pytest.approx([5.0]), True)
    with pytest.raises(SystemExit, match="2"):
        compress.main(["--table", str(tmp_path / "runs" / "broken")])


@pytest.mark.parametrize("key, value, said", [
    ("control", -1.0, "control is -1.0, not a loss above 0 or null"),
    ("after", {"loss": "low"}, "after: loss is low"),
    ("weights_sha256", "12", "not a SHA-256"),
    ("options", {"a": [1]}, "options is"),
    ("format", 2, "another version"),
])  # fmt: skip
def test_a_record_with_wrong_values_is_refused(tmp_path, key, value, said):
    values = record().values() | {key: value}
    (tmp_path / COMPRESSION).write_text(json.dumps(values))
    with pytest.raises(BadInput, match=said):
        Record.read(tmp_path)
    values[key] = record().values()[key]
    (tmp_path / COMPRESSION).write_text(json.dumps(values))
    assert Record.read(tmp_path) == record()


def test_compare_shows_runs_and_compressed_runs_also_in_its_report(tmp_path):
    pytest.importorskip("matplotlib")
    make_run(tmp_path / "runs", "tp")
    for method, loss in (("nf4", 2.1), ("8da4w", 2.05)):
        write(tmp_path / "runs" / f"tp-{method}", method=method, loss=loss)
    page = tmp_path / "report.html"
    command = [sys.executable, str(COMPARE), str(tmp_path / "runs"), "--html", str(page)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    assert run.stdout.index("Same work") < run.stdout.index("parent, float32"), "the runs come first"
    text = page.read_text()
    assert "1 run compared" in text and "<h2>Compressed: tiny, 128 wide" in text
    assert '<td class="best">yes</td>' in text and "<title>8da4w: 0.19 MiB, loss 2.0500</title>" in text


def study(*, qat=1.0, post=3.0, pruned=0.5, student=2.4, spread=0.0):
    """Rows of two seeds. The costs in % of post-training quantisation, with rounding and of pruning; a student's loss,
    where the teacher has 2 and the control 3."""
    rows = []
    for seed in (1, 2):
        off = spread * (seed - 1.5)
        made = [
            record("int8_weight_only", 2.001, 250_000),
            record("qat_8da4w", 2 * (1 + (qat + off) / 100), control=2.0, retrain=5),
            record("prune_2_4", 2 * (1 + (pruned + off) / 100), control=2.0, score="wanda", retrain=5),
            record("distil", 3.0, init="scratch", kl=False, retrain=5),
            record("distil", student, init="teacher", kl=True, retrain=5),
        ]
        rows += [{"seed": seed, "of": "parent", "label": one.label, "record": one.values()} for one in made]
        rows += [{"seed": seed, "of": "trained_on", "label": "8da4w", "on": "cpu",
                  "record": record("8da4w", 2 * (1 + (post + off) / 100)).values()}]  # fmt: skip
    return [*rows, {"seed": 1, "of": "2:4 kernels", "label": "prune_2_4 score=wanda"}]


def test_the_bars_are_judged_where_a_cost_is_above_its_spread():
    int8, qat, pruned, student = bars.verdicts(study())
    assert int8.endswith("+0.050 % of loss at 25.0 % of the bytes: reached (0.1 %, 30 %)")
    assert qat.endswith("reached (half)") and pruned.endswith("reached (1 %)") and "closes 60 %: reached" in student
    _, qat, pruned, student = bars.verdicts(study(qat=1.6, pruned=1.1, student=2.6))
    assert qat.endswith("missed (half)") and pruned.endswith("missed (1 %)") and "closes 40 %: missed" in student
    _, qat, pruned, _ = bars.verdicts(study(spread=4.0))
    assert "no measurable loss" in qat and "no measurable loss" in pruned
    assert bars.verdicts([]) == []
