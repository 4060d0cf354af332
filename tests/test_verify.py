"""`scripts/verify.py`: what it prints, its exit code, and that it never waits for long.

tests/test_verify_sizes.py tests the sizes that it chooses, and tests/test_locating.py what it says of a wrong strategy.
"""

import dataclasses
import math
import os
import re
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from scripts.verifying.report import EXIT_UNJUDGED, Answer, Judgement, exit_code, report
from tests.rows.base import BASE
from tests.running import job, run_jobs
from train.command import cli
from train.config.plan import Plan
from train.data.corpus import load_corpus
from train.proof.comparison import CannotBeJudged, Evidence, Verdict
from train.proof.jobs import check_reference

REPO = Path(__file__).resolve().parent.parent
SMALL = ("model.num_layers=2", "train.seq_len=16", "train.global_batch_size=4", "runtime.device=cpu")


def verify(*argv, bad_worker=""):
    script = "from scripts.verify import main; import sys; sys.exit(main(sys.argv[1:], 'tests.bad_worker'))"
    command = [sys.executable, *(["-c", script] if bad_worker else [str(REPO / "scripts" / "verify.py")]), *argv]
    env = os.environ | {"OMP_NUM_THREADS": "1", "BAD_WORKER": bad_worker, "PYTHONPATH": str(REPO)}
    return subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=200)


def test_several_strategies_in_one_world_equal_one_device():
    run = verify("nproc=2", "strategy=tp,pp", "precision=float64", *SMALL)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("\n  equals one device\n") == 2
    assert "tp on 2 process(es): tp 2" in run.stdout
    rows = [line.split() for line in run.stdout.splitlines() if line.endswith(" ok")]
    columns = ["loss", "gradients", "grad_norm", "sgd_weights", "adamw_loss", "evaluate", "replicas"]
    assert [row[0] for row in rows] == columns * 2
    assert "  chosen: model.vocab_size=257 data.ignore_token=32 train.micro_batch_size=2\n" in run.stdout
    summary = [line.split() for line in run.stdout.splitlines()[-2:]]
    assert [row[:7] for row in summary] == [
        [name, name, "2", "float64", "equals", "one", "device"] for name in ("tp", "pp")
    ]
    assert all(float(row[-3]) <= 1e-9 for row in rows)  # before the bound and "ok"


def test_without_its_reference_a_strategy_cannot_be_judged_but_the_others_are():
    run = verify("nproc=2", "strategy=dp,tp", "runtime.device=cpu", bad_worker="small_reference_fails")
    assert run.returncode == EXIT_UNJUDGED, run.stdout + run.stderr
    dp, tp = run.stdout.split("\ndp on ")[1].split("\ntp on ")
    assert dp.rstrip().endswith("equals one device")
    assert "cannot be judged: one device could not be run: RuntimeError: one device has no luck\n" in tp
    assert "Traceback" not in run.stdout


@pytest.mark.timeout(200)
def test_the_first_failed_job_keeps_its_error_and_the_others_run_again(tmp_path):
    words = [*BASE, "strategy=dp", "train.global_batch_size=4", "runtime.device=cpu", "precision=float64"]
    single = [word if word != "strategy=dp" else "strategy=single" for word in words]
    reference = str(tmp_path / "one.pt")
    run_jobs(tmp_path / "one", [job("one", single, save=reference)], size=1)
    names = ["comparing_fails", "rank_0_fails_alone", "then", "raises", "last"]
    jobs = [job(name, words, reference=reference) for name in names]
    found = run_jobs(tmp_path / "two", jobs, size=2, worker="tests.bad_worker")
    assert "lost.weight" in found["comparing_fails"]["error"] and "rank" not in found["comparing_fails"]
    assert "rank 0 has no luck" in found["rank_0_fails_alone"]["error"]
    assert "rank 1 has no luck" in found["raises"]["error"]
    for name in ("then", "last"):
        assert "error" not in found[name] and all(Verdict(*values).ok for values in found[name]["verdicts"])
    worlds = sorted(path.name for path in (tmp_path / "two").glob("world_*/"))
    assert worlds == ["world_2_0", "world_2_2", "world_2_4"]  # an error in comparing ends no world


def reference_of(norm, loss=2.0):
    """The evidence of one device, with a gradient of this norm."""
    one = {"one": torch.tensor(norm)}
    grad_norm, losses = {"norm": torch.tensor(norm)}, {"loss": torch.tensor(loss)}
    given = {"loss": losses, "gradients": one, "grad_norm": grad_norm, "sgd_weights": {}, "adamw_loss": losses}
    return Evidence(**{field.name: given.get(field.name, {}) for field in dataclasses.fields(Evidence)})


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (reference_of(1.0), None),
        (reference_of(0.0), "the gradient norm of one device is 0"),
        (reference_of(1.0, math.nan), "loss (loss) of one device is not finite"),
        (reference_of(math.inf), "one (gradients) of one device is not finite"),
    ],
)
def test_a_reference_must_be_something_to_compare_with(reference, message):
    config = cli.configured(["strategy=single"])
    with pytest.raises(CannotBeJudged, match=re.escape(message)) if message else nullcontext():
        check_reference(reference, config, load_corpus(config))


def test_a_batch_needs_a_target_with_a_loss(tmp_path):
    (tmp_path / "text").write_text("a" * 5000 + "b" + "a" * 1000 + "b" * 9)
    words = [
        "strategy=single",
        "data=text",
        f"data.path={tmp_path / 'text'}",
        "train.seq_len=8",
        "train.eval_batches=1",
    ]
    config = cli.configured([*words, f"data.ignore_token={ord('a')}", "train.global_batch_size=2"])
    with pytest.raises(CannotBeJudged, match=r"all 16 targets of the batch are data.ignore_token=97"):
        check_reference(reference_of(0.0), config, load_corpus(config))


def judgement(answer):
    return Judgement(Plan(cli.configured(["strategy=dp"]), 2), answer)


@pytest.mark.parametrize(
    ("answers", "code"),
    [
        ([Answer.equals], 0),
        ([Answer.equals, Answer.unjudged], EXIT_UNJUDGED),
        ([Answer.unjudged, Answer.differs], 1),
        ([Answer.not_run, Answer.unjudged], 1),
    ],
)
def test_the_worst_answer_decides_the_exit_code(answers, code):
    assert exit_code([judgement(answer) for answer in answers]) == code


def test_the_report_says_what_a_lossy_option_does(capsys):
    plan = Plan(cli.configured(["strategy=dp", "strategy.comm_hook=powersgd"]), 2)
    assert report(plan, {"verdicts": [["loss", "loss", 1e-7, 1e-5, ""]]}).answer is Answer.equals
    out = capsys.readouterr().out
    assert "  strategy.comm_hook=powersgd rounds gradients before they are sent\n" in out
    assert "strategy.comm_hook=powersgd (it starts after these few steps)\n  equals one device\n" in out


def test_the_report_counts_replayed_choices_and_judges_each_kind_of_result(capsys):
    plan = Plan(cli.configured(["strategy=dp"]), 2)
    facts = {"masked": True, "clipped": True, "replayed": 3, "choices": 192}
    assert report(plan, {"verdicts": [["loss", "loss", 1e-3, 1e-5, ""]], "facts": facts}).answer is Answer.differs
    assert "  3 of 192 choices of experts replayed\n" in capsys.readouterr().out
    allowed = report(plan, {"verdicts": [["loss", "loss", 1e-3, 1e-5, "meets later"]]})
    assert allowed.answer is Answer.equals and allowed.worst is not None
    assert report(plan, {"unjudged": "no target"}).answer is Answer.unjudged
    assert report(plan, {"error": "rank 1 exited"}).answer is Answer.not_run
    out = capsys.readouterr().out
    assert "choices" not in out and "equals one device but for loss, as expected" in out
    assert "cannot be judged: no target" in out and "could not be run:\n    rank 1 exited" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("dies", "rank 1 exited with code 7"),
        ("raises", "rank 1 has no luck"),
        ("hangs", "runtime.timeout_s"),
    ],
)
def test_a_lost_rank_ends_the_command(kind, message):
    started = time.monotonic()
    run = verify("nproc=2", "strategy=dp", "runtime.timeout_s=10", *SMALL, bad_worker=kind)
    assert run.returncode == 1, run.stdout + run.stderr
    assert message in run.stdout
    assert time.monotonic() - started < 10 + 20 + 30  # the reference's world, the other, and imports


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("nproc=2 strategy=dp,", "strategy= does not name a preset"),
        ("nproc=2 strategy=dp,foo", "strategy=foo does not name a preset"),
        ("nproc=4 strategy=dp,tp model.ffn_dim=350", "model.ffn_dim=350 is not divisible by strategy.tp=4"),
        ("nproc=2 strategy=single", "strategy=single runs on 1 process"),
        ("nproc=2 strategy=tp model.dropout=0.1", "model.dropout=0.1 draws masks that differ"),
        ("nproc=none", "nproc=none"),
    ],
)
def test_bad_input(argv, message):
    run = verify(*argv.split())
    assert (run.returncode, run.stdout) == (2, "")
    assert message in run.stderr and "Traceback" not in run.stderr
