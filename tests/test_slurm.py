"""launch.slurm and its batch script on a real Slurm of two nodes (tests/slurm_cluster.py), and what is answered without
one."""

import signal
import sys
import time

import pytest

from launch import slurm as launcher
from tests.faults import LINE, LONG_EVERY, LONG_LINE, LONG_STEPS, TEXT, has_saved, losses_of, newest_step, run_in
from tests.slurm_cluster import ENDED, job_env
from tests.started import REPO
from train.command.process.exits import SIGNALS

slow = pytest.mark.slow


def shown(capsys, *words):
    assert launcher.main([*words, "dry_run=true"]) == 0
    return capsys.readouterr().out.splitlines()


def test_dry_run_shows_the_job_and_the_lines_of_its_nodes(capsys):
    given = ["nodes=2", "gpus_per_node=8", "join_s=90", "strategy=3d", "train.steps=7", "train.global_batch_size=32"]
    line, first, zero, last, one = shown(capsys, *given, "sbatch=--time=60 --partition=gpu")
    words = "strategy=3d train.steps=7 train.global_batch_size=32"
    assert f"STRATEGY_LAB_PYTHON={sys.executable} " in line
    assert line.endswith(
        "sbatch --nodes=2 --gpus-per-node=8 --time=60 --partition=gpu launch/slurm.sbatch nproc=16 join_s=90 " + words
    )
    assert (first, last) == ("# node 0 runs", "# node 1 runs")
    for number, said in enumerate((zero, one)):
        where = f"--nnodes=2 --node_rank={number} --master_addr=HEAD --master_port=PORT --local_addr=ADDRESS"
        assert said == f"torchrun {where} --nproc_per_node=8 train/main.py {words}"


def test_a_sweep_is_an_array_of_jobs(capsys):
    line, *lines = shown(capsys, "strategy=dp,pp", "nproc=2", "train.steps=7")
    words = "-- nproc=2 strategy=dp train.steps=7 -- nproc=2 strategy=pp train.steps=7"
    assert line.endswith(f"sbatch --nodes=1 --array=0-1 launch/slurm.sbatch {words}")
    assert lines[::2] == ["# node 0 of dp runs", "# node 0 of pp runs"]
    runs = [f"strategy={name} train.steps=7" for name in ("dp", "pp")]
    assert [one.partition("train/main.py ")[2] for one in lines[1::2]] == runs


WRONG = {
    "nodes=2 strategy=tp strategy.tp=3": "strategy.tp=3",
    "nodes=2 nproc=3": "nproc=3 is not divisible by nodes=2",
    "strategy=tp,pp nproc=3": "1 of 2 point(s) cannot be run",
    "strategy=dp,tp strategy.tp=3 nproc=2": "strategy.tp",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_line_never_waits_in_a_queue(line, capsys):
    with pytest.raises(SystemExit) as ended:
        launcher.main(line.split())
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (2, "") and WRONG[line] in said.err


def test_tensor_parallelism_across_nodes_is_warned_of(capsys):
    launcher.main(["nodes=2", "nproc=4", "strategy=tp", "dry_run=true"])
    assert "warning: strategy.tp=4 crosses nodes of 2 process(es)" in capsys.readouterr().err


def test_without_slurm_the_answer_names_dry_run(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit) as ended:
        launcher.main(["strategy=dp"])
    assert ended.value.code == 3 and "sbatch is not found: run this where" in capsys.readouterr().err


def submitted(slurm, folder, *words):
    """Submit by launch.slurm, as a user does. Returns the number of the job."""
    (folder / "text.txt").write_text(TEXT)
    line = [sys.executable, "-m", "launch.slurm", *words]
    code, out, err = slurm.run(*line, cwd=folder, env=job_env())
    assert code == 0, err
    return int(out.split()[-1])


def output(folder, number):
    file = folder / f"slurm-{number}.out"
    return file.read_text() if file.exists() else ""


def ended(slurm, folder, number, state="COMPLETED"):
    """What is known of the job when it has ended in this state. Nothing of it is left on the nodes."""
    found = slurm.wait(number, *ENDED)
    assert found["JobState"] == state, output(folder, number)
    slurm.until(lambda: slurm.idle())
    return found


@pytest.fixture
def job(slurm, tmp_path):
    """Submits a job on two nodes, and cancels it at the end of the test."""
    numbers = []

    def submit(*words):
        numbers.append(submitted(slurm, tmp_path, "nodes=2", "nproc=2", "join_s=200", *LONG_LINE, *words))
        return numbers[-1]

    yield submit
    for number in numbers:
        slurm.run("scancel", "--signal=KILL", "--full", str(number))
    slurm.until(slurm.idle)


@slow
@pytest.mark.timeout(400)
def test_a_job_trains_the_curve_of_one_machine_after_usr1_and_a_lost_node(slurm, job, undisturbed_long, tmp_path):
    """USR1 goes to the batch script alone, as before the end of the time; then a node goes down, and is left. After
    each the job is queued again, and goes on."""
    number = job()
    slurm.until(lambda: has_saved(tmp_path))
    slurm.run("scancel", "--batch", "--signal=USR1", str(number))
    slurm.at_once(number)
    slurm.until(lambda: output(tmp_path, number).count("continuing runs/") == 1)
    slurm.power_off("n2")
    slurm.wait(number, "PENDING")
    slurm.until(lambda: slurm.state("n2") == "DOWN")
    slurm.boot("n2")
    slurm.at_once(number, restarts=2)
    found = ended(slurm, tmp_path, number)
    said = output(tmp_path, number)
    assert found["Restarts"] == "2" and losses_of(run_in(tmp_path)) == undisturbed_long, said
    assert "SIGUSR1 ended the run" in said and "is put back into the queue" in said
    assert said.count("continuing runs/") == 2 and newest_step(run_in(tmp_path)) == LONG_STEPS
    assert said.count(f"--master_addr=127.0.0.1 --master_port={10000 + number % 20000} ") == 6, "2 nodes, 3 starts"
    for start in range(3):
        logs = tmp_path / f"slurm-{number}" / f"start-{start}"
        assert sorted(path.name for path in logs.iterdir()) == ["rank-0.err", "rank-0.out", "rank-1.err", "rank-1.out"]
    assert f"step {LONG_STEPS}/{LONG_STEPS}" in (logs / "rank-0.out").read_text()
    assert (logs / "rank-1.out").read_text() == "", "one rank speaks for all"


@slow
@pytest.mark.timeout(200)
def test_scancel_leaves_nothing_and_does_not_queue_the_job_again(slurm, job, tmp_path):
    number = job("train.steps=100000")
    slurm.until(lambda: has_saved(tmp_path))
    slurm.run("scancel", str(number))
    found = ended(slurm, tmp_path, number, "CANCELLED")
    assert found["Restarts"] == "0" and slurm.of_jobs() == []
    time.sleep(1)
    assert slurm.job(number)["JobState"] == "CANCELLED"
    said, run = output(tmp_path, number), run_in(tmp_path)
    assert "SIGTERM ended the run" in said and newest_step(run) >= LONG_EVERY and not [*run.rglob("*.tmp-*")]


@slow
@pytest.mark.timeout(300)
def test_a_sweep_runs_every_point(slurm, tmp_path):
    words = ["strategy=dp,pp", "nproc=2", "join_s=200", *LINE[1:], "train.steps=2", "model.dropout=0"]
    number = submitted(slurm, tmp_path, *words)
    for point in ("0", "1"):
        slurm.wait(f"{number}_{point}", *ENDED)
    slurm.until(slurm.idle)
    runs = sorted(path.name.partition("-")[0] for path in (tmp_path / "runs").iterdir())
    assert runs == ["dp", "pp"], [output(tmp_path, one) for one in (number, number + 1)]
    first, second = (
        [numbers["train/loss"] for _, numbers in losses_of(path) if "train/loss" in numbers]
        for path in (tmp_path / "runs").iterdir()
    )
    assert len(first) == 2 and first == pytest.approx(second, rel=1e-5)


@slow
@pytest.mark.timeout(200)
def test_what_only_the_nodes_can_see_ends_the_job_with_its_code(slurm, job, tmp_path):
    number = job("runtime.device=cuda")
    found = ended(slurm, tmp_path, number, "FAILED")
    assert found["ExitCode"] == "3:0" and "runtime.device=cuda, but this machine has no cuda device" in output(
        tmp_path, number
    )


def test_the_signal_of_the_script_is_one_that_ranks_save_on():
    script = (REPO / "launch/slurm.sbatch").read_text()
    assert "#SBATCH --signal=B:USR1@120\n" in script and "#SBATCH --requeue\n" in script and signal.SIGUSR1 in SIGNALS
