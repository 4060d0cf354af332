"""Untrusted run folders (hostile_folders.py): a bad one is left out with one line, and the others are compared."""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.comparing import table
from scripts.comparing.finding import Search
from scripts.comparing.gate import groups_of
from scripts.comparing.pages import page
from tests.hostile_folders import ESCAPES, FOLDERS, SKIPPED, TAKEN, values
from tests.synthetic_runs import WORK, make_run

COMPARE = Path(__file__).resolve().parent.parent / "scripts" / "compare.py"


@pytest.fixture
def runs(tmp_path):
    """A folder with two good runs."""
    for strategy in ("dp", "tp"):
        make_run(tmp_path / "runs", strategy, name=f"good-{strategy}")
    return tmp_path / "runs"


def good_rows(groups):
    return {row.run.path.name: row for group in groups for row in group.rows if row.run.path.name.startswith("good-")}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_costs_itself_and_the_others_compare(name, runs):
    act, outcome, says = FOLDERS[name]
    act(make_run(runs, "fsdp", name="odd"))
    began = time.monotonic()
    search = Search([runs])
    groups = groups_of(search.runs)
    assert {row.equal for row in good_rows(groups).values()} <= {"reference", "yes (0)"}
    assert len(good_rows(groups)) == 2
    labels = {row.run.path.name for group in groups for row in group.rows}
    assert ("odd" in labels) is (outcome != SKIPPED)
    notes = [*search.notes, *(note for group in groups for note in group.notes)]
    found = [note for note in notes if says in note] if says else []
    assert len(found) == (0 if outcome == TAKEN else 1), notes
    assert all(note.isprintable() for note in notes)
    texts = [table.to_markdown(groups), table.to_csv(groups), table.to_json(groups)]
    assert not any(c in text for text in texts for c in "\x1b\x07\u202e\x00\ud800")
    assert time.monotonic() - began < 20


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_no_folder_ends_the_page(runs):
    pytest.importorskip("matplotlib")
    for name, (act, outcome, _) in FOLDERS.items():
        if outcome != SKIPPED:
            act(make_run(runs, "fsdp", name=name))
    text = page.report(groups_of(Search([runs]).runs), [])
    assert "<script>alert" not in text and "good" not in text.partition("<main>")[0]
    assert not any(c in text for c in "\x1b\x07\u202e\x00\ud800")
    assert all(name in text for name in ("dp", "tp"))


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_all_at_once_in_a_terminal_within_time_and_memory(runs):
    for name, (act, _, _) in FOLDERS.items():
        act(make_run(runs, "fsdp", name=name))

    def bound():
        resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))

    command = [sys.executable, str(COMPARE), str(runs)]
    run = subprocess.run(command, capture_output=True, timeout=60, preexec_fn=bound)
    out, err = run.stdout.decode(), run.stderr.decode()
    assert run.returncode == 0, err
    assert "Traceback" not in err
    assert all(line.startswith("compare: ") for line in err.splitlines())
    assert sum("skipped" in line for line in err.splitlines()) == sum(
        kind == SKIPPED for _, kind, _ in FOLDERS.values()
    )
    assert "good" not in err
    assert all(c.isprintable() or c == "\n" for c in out + err)


def test_folders_that_are_no_runs(runs, tmp_path):
    elsewhere = make_run(tmp_path, "pp")
    (runs / "away").symlink_to(elsewhere)
    (runs / "round").symlink_to(runs)
    (runs / "sweep-x").mkdir()
    points = [{"run_dir": "../../etc"}, {"run_dir": ".."}, {"run_dir": "x" * 5000}, {"run_dir": 5}, "point",
              {"run_dir": str(elsewhere)}, {"run_dir": "gone\x00", "status": "failed", "label": ESCAPES}]  # fmt: skip
    (runs / "sweep-x" / "points.json").write_text(json.dumps({"points": points, "fairness": "unfair"}))
    (runs / "sweep-y").mkdir()
    os.mkfifo(runs / "sweep-y" / "points.json")
    search = Search([runs])
    assert [run.path.name for run in search.runs] == ["good-dp", "good-tp"]
    said = "\n".join(search.notes)
    assert f"{runs}/away: skipped: a link that leads out of {runs}: name it to compare it" in said
    assert "point 4 is left out" in said and "point 5 is left out" in said
    assert "sweep-y: the sweep cannot be read: points.json is not a regular file" in said
    assert [line for line in search.points_without_run() if not line.isprintable()] == []
    assert [run.strategy for run in Search([runs / "away"]).runs] == ["pp"], "one that is named may be a link"


@pytest.mark.parametrize(
    "claim",
    [
        {"lossy": {"says": "it may", "bound": 1e9}},
        {"lossy": {"says": "it may", "bound": None}},
        {"differs": {"loss": "it may"}},
        {"precision": "bf16"},
        {"precision": "any"},
        {"work_hash": "0"},
    ],
)
def test_what_a_run_says_of_itself_excuses_nothing(claim, runs):
    run = make_run(runs, "fsdp", off=0.05)
    for name in ("work.json", "summary.json"):
        values(name, **claim)(run)
    (group,) = groups_of(Search([runs]).runs)
    row = next(row for row in group.rows if row.run.strategy == "fsdp")
    assert row.equal == "loss differs (1.3e-02)" and not row.good


@pytest.mark.parametrize(
    ("keys", "good"),
    [
        (", dp_replicate: -1, comm_hook: bf16", True),  # within 2e-2
        (", dp_replicate: -1, comm_hook: fp16", False),  # 2e-3
        (", dp_replicate: -1, comm_hook: powersgd", True),  # no bound is known
        (", dp_replicate: -1, comm_hook: anything", False),
        (", tp: -1, comm_hook: powersgd", False),  # nothing goes through a hook
        (", comm_hook: [powersgd]", False),
        (", dp_replicate: many, comm_hook: powersgd", False),
        (", unknown: 1, dp_replicate: -1, comm_hook: powersgd", False),
    ],
)
def test_the_bound_of_a_lossy_option_follows_from_the_config(keys, good, runs):
    make_run(runs, "fsdp", off=0.05, keys=keys)
    (group,) = groups_of(Search([runs]).runs)
    assert next(row for row in group.rows if row.run.strategy == "fsdp").good is good


def test_a_value_from_the_environment_is_known_by_the_hash_that_the_run_wrote(tmp_path):
    """work.json has a digest instead of the value, so that nobody can read it there. The hash is that of the value."""
    for strategy, rate in (("dp", 0.001), ("tp", "sha256:0123456789ab")):
        run = make_run(tmp_path, strategy, work={"optim": {"name": "adamw", "lr": rate}})
        if strategy == "tp":
            values("work.json", work_hash=Search([tmp_path / "dp-x2-ws2-abcdef"]).runs[0].work_hash)(run)
    (group,) = groups_of(Search([tmp_path]).runs)
    assert [row.equal for row in group.rows] == ["reference", "yes (0)"]


def test_steps_without_a_valid_token_are_not_compared(tmp_path):
    for strategy in ("dp", "tp"):
        run = make_run(tmp_path, strategy)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        lines[2] |= {"train/loss": None, "train/valid_tokens": 0}
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (group,) = groups_of(Search([tmp_path]).runs)
    assert [row.equal for row in group.rows] == ["reference", "yes (0)"]


def test_one_wrong_run_does_not_become_the_reference(tmp_path):
    """The wrong run is the first in the folder, and the others agree."""
    for strategy, off in (("cp", 0.5), ("dp", 0.0), ("tp", 1e-7)):
        make_run(tmp_path, strategy, off=off)
    (group,) = groups_of(Search([tmp_path]).runs)
    assert {row.run.strategy: row.good for row in group.rows} == {"cp": False, "dp": True, "tp": True}


def test_validation_losses_of_other_windows_are_other_work(tmp_path):
    for count in (1, 2):
        train = WORK["train"] | {"eval_batches": count}
        make_run(tmp_path, "dp", work={"train": train}, name=f"dp-{count}")
    first, other = groups_of(Search([tmp_path]).runs)
    assert other.heading == "Other work, not comparable with the first table: train.eval_batches 2, not 1"
    assert [row.equal for row in (*first.rows, *other.rows)] == ["-", "-"]


def test_older_runs_have_their_windows_from_their_config(tmp_path):
    """Their work.json does not name train.eval_batches."""
    train = {name: value for name, value in WORK["train"].items() if name != "eval_batches"}
    for count in (8, 2):
        run = make_run(tmp_path, "tp", work={"train": train}, name=f"tp-{count}")
        text = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(text.replace("train: {", f"train: {{eval_batches: {count}, "))
    make_run(tmp_path, "dp")
    same, other = groups_of(Search([tmp_path]).runs)
    assert {row.run.path.name for row in other.rows} == {"tp-2"} and len(same.rows) == 2


@pytest.mark.parametrize(
    ("key", "settings", "note"),
    [
        ("warmup_steps", (0, 5), "not the same metrics.warmup_steps: 0, 5"),
        ("profile_every", (1, 500), "not the same metrics.profile_every: 1, 500"),
        ("trackers", ("[]", "[mlflow]"), "not the same metrics.trackers: [], ['mlflow']"),
    ],
)
def test_how_figures_were_measured_is_marked_where_it_differs(key, settings, note, tmp_path):
    for value in settings:
        run = make_run(tmp_path, "dp", name=f"dp-{value}")
        text = (run / "config.yaml").read_text().replace("metrics: {warmup_steps: 5}", f"metrics: {{{key}: {value}}}")
        (run / "config.yaml").write_text(text)
    (group,) = groups_of(Search([tmp_path]).runs)
    assert note in group.notes


def test_prices_and_peaks_that_differ_are_marked(tmp_path):
    for price in (2.0, 3.0):
        run = make_run(tmp_path, "dp", name=f"dp-{price}")
        with (run / "config.yaml").open("a") as file:
            file.write(f"hardware: {{price_usd_per_hour: {price}, peak_tflops: {{bf16: {100 * price}}}}}\n")
    (group,) = groups_of(Search([tmp_path]).runs)
    assert "not the same hardware.price_usd_per_hour: 2.0, 3.0" in group.notes
    assert "not the same hardware.peak_tflops: {'bf16': 200.0}, {'bf16': 300.0}" in group.notes


def test_a_running_run_says_of_which_step_its_validation_loss_is(tmp_path):
    make_run(tmp_path, "dp")
    run = make_run(tmp_path, "tp", finished=False, steps=8)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, "time": 1.0, "validation/loss": 4.5}) + "\n")
    notes = [note for group in groups_of(Search([tmp_path]).runs) for note in group.notes]
    assert "validation losses are of different steps: 5, 12" in notes
