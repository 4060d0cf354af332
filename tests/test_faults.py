"""However a run is cut off, nothing is lost: the same line continues it, as if it had not been cut off.

After each fault there is a complete, verified checkpoint, no older than `checkpoint.every` steps; the exit code and one
line say the reason; after the resume each step is once in metrics.jsonl and in TensorBoard, with the loss of the
undisturbed run to the last bit; and nothing unfinished is left.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train.checkpoint.checkpoints import state_bytes
from train.checkpoint.folder import CHECKPOINTS, complete, step_of
from train.checkpoint.manifest import Manifest, wrong_files
from train.command import cli
from train.command.process.life import is_alive, read_life
from train.model.transformer import Transformer, dtypes

REPO = Path(__file__).resolve().parent.parent
PATHS = os.pathsep.join([str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])])
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS}
EVERY, STEPS = 4, 40
LINE = [
    *(
        "strategy=dp",
        "runtime.device=cpu",
        "model.num_layers=2",
        "model.dim=64",
        "train.seq_len=32",
        "model.dropout=0.1",
    ),
    *("train.eval_every=10", "train.eval_batches=1", f"train.steps={STEPS}", f"checkpoint.every={EVERY}"),
    *("metrics.profile_every=0", "runtime.timeout_s=30"),
]
PATIENCE_S = 100


def torchrun(folder, fault, *more):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local_addr=127.0.0.1"]
    script = ["--nproc_per_node=2", str(REPO / "tests" / "faulty_main.py"), fault, str(folder / "marker")]
    line = [*torchrun, *script, *LINE, *more]
    pipe = subprocess.PIPE
    return subprocess.Popen(line, cwd=folder, env=ENV, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


@pytest.fixture
def start(tmp_path):
    """Starts a run in tmp_path, and ends all its processes at the end of the test."""
    started = []

    def run(fault="none", *more):
        started.append(torchrun(tmp_path, fault, *more))
        return started[-1]

    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The losses by step of a run without a fault."""
    folder = tmp_path_factory.mktemp("undisturbed")
    process = torchrun(folder, "none")
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, errors
    return losses_of(run_in(folder))


def run_in(folder):
    (run,) = (folder / "runs").iterdir()
    return run


def life_of(run):
    life = read_life(run)
    assert life is not None
    return life


def losses_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        (line["step"], {tag: line[tag] for tag in ("train/loss", "train/grad_norm", "validation/loss") if tag in line})
        for line in lines
    ]


def reaches(process, folder, step):
    """Wait until the run has a checkpoint of this step or a later one. Returns the run."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        for run in (folder / "runs").glob("*"):
            if (run / CHECKPOINTS / "latest").exists() and (step_of(complete(run)[0]) or 0) >= step:
                return run
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    raise AssertionError("no checkpoint")


def ranks_of(process):
    found = psutil.Process(process.pid).children(recursive=True)
    return sorted((one for one in found if "RANK" in one.environ()), key=lambda one: int(one.environ()["RANK"]))


def nothing_is_lost(run, process, start, undisturbed, *, resumes=True):
    """Check what is left, and that the same line continues to the end of the undisturbed run."""
    out, errors = process.communicate(timeout=PATIENCE_S)
    good = [path for path in complete(run) if not wrong_files(path, Manifest.read(path))]
    last = losses_of(run)[-1][0]
    assert good and last - step_of(good[0]) <= EVERY, (last, good)
    assert not is_alive(run) and life_of(run).state in ("running", "saved")
    if resumes:
        again = start()
        _, problems = again.communicate(timeout=PATIENCE_S)
        assert again.returncode == 0, problems
        assert losses_of(run) == undisturbed
        events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
        assert [event.step for event in events.Scalars("train/loss")] == [*range(1, STEPS + 1)]
        assert [path.name for path in (run / CHECKPOINTS).iterdir() if ".tmp" in path.name] == []
        assert life_of(run).state == "finished"
    return out, errors


KILLED = ["killed_while_writing", "killed_before_the_manifest", "killed_before_the_name", "killed_before_latest"]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("fault", KILLED)
def test_killed_at_a_moment_of_a_save(fault, start, undisturbed, tmp_path):
    """The first save is not disturbed, the later ones are: there must be something to go on from."""
    first = start("slow")
    run = reaches(first, tmp_path, EVERY)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    (tmp_path / "marker").rmdir()
    process = start(fault)
    process.wait(PATIENCE_S)
    assert (tmp_path / "marker").exists(), "the fault did not happen"
    assert process.returncode != 0
    nothing_is_lost(run, process, start, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_rank(rank, start, undisturbed, tmp_path):
    process = start("slow")
    run = reaches(process, tmp_path, EVERY)
    ranks_of(process)[rank].kill()
    nothing_is_lost(run, process, start, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_torchrun(start, undisturbed, tmp_path):
    process = start("slow")
    run = reaches(process, tmp_path, EVERY)
    ranks = ranks_of(process)
    process.kill()
    assert not psutil.wait_procs(ranks, timeout=30)[1], "something trains on"
    nothing_is_lost(run, process, start, undisturbed)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_signal_to_torchrun_saves(number, start, undisturbed, tmp_path):
    process = start("slow")
    run = reaches(process, tmp_path, EVERY)
    process.send_signal(number)
    started = time.monotonic()
    out, errors = nothing_is_lost(run, process, start, undisturbed)
    assert errors.count("checkpoint saved at step ") == 1, errors
    assert f"{number.name} ended the run; the same command line continues it" in errors
    assert time.monotonic() - started < PATIENCE_S
    assert f"continuing {run.relative_to(tmp_path)} after step" not in out


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_usr1_to_one_rank_saves_on_all(start, undisturbed, tmp_path):
    process = start("slow")
    run = reaches(process, tmp_path, EVERY)
    ranks_of(process)[1].send_signal(signal.SIGUSR1)
    _, errors = nothing_is_lost(run, process, start, undisturbed)
    assert errors.count("checkpoint saved at step ") == 1 and "SIGUSR1 ended the run" in errors
    assert "exitcode  : 75" in errors or "exitcode: 75" in errors.replace(" ", "")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_rank_that_raises_has_its_traceback_once(start, undisturbed, tmp_path):
    process = start("raises_on_one_rank")
    process.wait(PATIENCE_S)
    run = run_in(tmp_path)
    _, errors = nothing_is_lost(run, process, start, undisturbed)
    assert errors.count("RuntimeError: a planted error") == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_not_finite_on_one_rank_stops_all_and_is_never_saved(start, undisturbed, tmp_path):
    process = start("not_finite_on_one_rank")
    _, errors = process.communicate(timeout=PATIENCE_S)
    run = run_in(tmp_path)
    assert process.returncode == 1 and "train/loss=nan" in errors
    assert [step_of(path) for path in complete(run)] == [EVERY], "the state of step 5 is not finite"
    assert life_of(run).state == "stopped" and "train/loss=nan" in life_of(run).reason
    again = start()
    again.communicate(timeout=PATIENCE_S)
    assert len([*(tmp_path / "runs").iterdir()]) == 2, "a run that was stopped is not continued"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_skip_makes_no_update(start, tmp_path):
    process = start("not_finite_on_one_rank", "train.on_nonfinite=skip", "train.steps=8")
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, errors
    losses = [line.get("train/loss") for _, line in losses_of(run_in(tmp_path))]
    assert losses[4] is None and all(loss is not None for loss in losses[5:8])


@pytest.mark.timeout(200)
def test_ranks_that_disagree_are_refused(start, tmp_path):
    process = start("other_config_on_one_rank")
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert errors.count("ranks have different values of optim.lr: 0.001 on ranks 0; 0.5 on ranks 1") == 1, errors
    assert not (tmp_path / "runs").exists(), "nothing was started"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_identical_runs_at_once(start, tmp_path):
    """One of them trains, and the other is refused with the first one's process."""
    both = [start(), start()]
    ends = [process.communicate(timeout=2 * PATIENCE_S)[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 1], ends
    refused = ends[codes.index(1)]
    assert "is being trained by process" in refused and "checkpoint.resume=never" in refused
    assert len([*(tmp_path / "runs").iterdir()]) == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_text_has_changed_between_runs(start, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("some words of a text " * 2000)
    words = ("data=text", f"data.path={text}")
    process = start("none", *words)
    reaches(process, tmp_path, EVERY)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    text.write_text("other words of a text " * 2000)
    again = start("none", *words)
    _, errors = again.communicate(timeout=PATIENCE_S)
    assert "data.corpus_sha256=" in errors and "train on the same text, or start a new run" in errors


def in_small_tmpfs(folder, kib, *more):
    """Run inside a user namespace, whose runs are on a tmpfs of this size."""
    (folder / "runs").mkdir()
    torchrun = f"{sys.executable} -m torch.distributed.run --standalone --local_addr=127.0.0.1 --nproc_per_node=2"
    line = " ".join([str(REPO / "train" / "main.py"), *LINE, *more])
    shell = f"mount -t tmpfs -o size={kib}k tmpfs {folder}/runs && {torchrun} {line}; ls -R {folder}/runs"
    command = ["unshare", "-Urm", "sh", "-c", shell]
    return subprocess.run(command, cwd=folder, env=ENV, capture_output=True, text=True, timeout=PATIENCE_S)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_full_disk_at_a_save(tmp_path):
    """There is room for two checkpoints, but not for a third before the first is removed."""
    config = cli.configured(LINE)
    model = Transformer(config.model, **dtypes(config.precision))
    size = state_bytes(config, sum(p.numel() for p in model.parameters()))
    assert size > 1.5 * 2**20, "room for the other files of the run"
    result = in_small_tmpfs(tmp_path, int(2.7 * size / 2**10))
    assert "was not saved: rank" in result.stderr and ": No space left on device; " in result.stderr, result.stderr
    assert "the newest good one is runs/" in result.stderr
    assert "step-4:" in result.stdout and "step-8:" in result.stdout and ".tmp" not in result.stdout
    assert "[rank0]: Traceback" not in result.stderr and "Exception in thread" not in result.stderr


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_full_disk_at_a_log(tmp_path):
    result = in_small_tmpfs(tmp_path, 400, "checkpoint.every=0", "train.steps=2000")
    assert "cannot be written any more (No space left on device)" in result.stderr, result.stderr
    assert "[rank0]: Traceback" not in result.stderr and "Exception in thread" not in result.stderr


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_no_room_for_two_is_refused_at_the_start(tmp_path):
    result = in_small_tmpfs(tmp_path, 1000)
    assert "two checkpoints need" in result.stderr and "checkpoint.every=0 to save none" in result.stderr


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_removed_run_directory(start, tmp_path):
    process = start("slow")
    run = reaches(process, tmp_path, EVERY)
    shutil.rmtree(run)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1 and "(No such file or directory)" in errors
