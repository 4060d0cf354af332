"""A whole run of launch.netlab: measured, predicted, trained and compared, and gone on with by the same line."""

import json
import time

import pytest

from tests.hosts import allowed
from tests.started import Started

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STEPS = 8
LINE = [
    *("nodes=2", "inter=50mbit", "strategy=dp,tp", "hardware=measured/cpu_x2", f"train.steps={STEPS}"),
    *("model.num_layers=2", "model.dim=64", "train.seq_len=64", "train.eval_every=0", "train.eval_batches=1"),
    *("metrics.warmup_steps=2", "metrics.profile_every=0", "metrics.tensorboard=false"),
]


def netlab(folder, *words):
    run = Started(folder, ["-m", "launch.netlab", *LINE, *words])
    code, said = run.end(400)
    left = [line for line in said.splitlines() if not line.startswith("launch.netlab of process ")]  # of another test
    assert (code, left) == (0, []), run.out()
    (path,) = folder.glob("runs/netlab-*/netlab.json")
    return json.loads(path.read_text()), run.out(), path.parent


def test_predicted_then_run_then_compared(tmp_path):
    allowed()
    found, out, folder = netlab(tmp_path)
    rows = {row["label"]: row for row in found["rows"]}
    assert rows.keys() == {"dp", "tp"} and {row["status"] for row in rows.values()} == {"done"}
    for row in rows.values():
        records = [json.loads(line) for line in (tmp_path / row["run_dir"] / "metrics.jsonl").read_text().splitlines()]
        assert row["predicted_at"] < records[0]["time"] < time.time(), "predicted before it ran"
        assert row["predicted_ms"] > 0 and row["crossing"] == (["dp_replicate"] if row["label"] == "dp" else ["tp"])
        # the interface counts every byte: those of the steps, headers, the validation and the start
        predicted = STEPS * sum(row["predicted_sent"].values())
        assert all(predicted < both[0] < 2 * predicted + 2**20 for both in row["sent"].values()), row
    assert {(op, ranks) for _, op, ranks, *_ in found["links"]} >= {("all_reduce", 2), ("send", 2)}
    assert (folder / "report.html").read_text().count("<svg") == 1 and (folder / "links.png").stat().st_size > 0
    assert "pairs of runs at the same speed" in out

    again, out, _ = netlab(tmp_path)
    assert [row["run_dir"] for row in again["rows"]] == [row["run_dir"] for row in found["rows"]], "nothing runs twice"
    assert [row["predicted_at"] for row in again["rows"]] == [row["predicted_at"] for row in found["rows"]]
    assert [row["sent"] for row in again["rows"]] == [row["sent"] for row in found["rows"]]
