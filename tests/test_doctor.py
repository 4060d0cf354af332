"""`launch.doctor` as a command, on a machine in good order and where nothing works, and what it says of two ranks.
tests/test_doctor_findings.py has the other findings."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import doctor, local
from launch.examine import torch_here
from launch.examine.child import MORE_TIME, Answers
from launch.examine.finding import error, guarded, ok, warning
from launch.start.environment import SET_BY_TORCHRUN
from tests.test_doctor_findings import ERROR, NO_NAME, OK, WARNING, check
from train.command import options
from train.command.process.exits import HINT
from train.config.problems import BadInput

REPO = Path(__file__).resolve().parent.parent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
GiB = 2**30
RANK = {"device": "cpu", "backend": "gloo", "all_reduce_ms": 3.0, "mib": 4.0, "s": 0.1}
GPU = {"name": "H100", "free": 79 * GiB, "total": 80 * GiB}
SAID: dict[str, Any] = {
    "torch": "2.13.0+cpu",
    "cuda": None,
    "import_s": 2.0,
    "ready_s": 2.5,
    "distributed": True,
    "backends": ["gloo"],
    "devices": {"devices": [], "device": "cpu", "backend": "gloo", "note": ""},
    "rank_0": RANK,
    "rank_1": RANK,
}
NOTE = SAID["devices"] | {"devices": [GPU], "note": "2 processes, 1 cuda device(s): running on the CPU"}
LATE, LOST = {"error": "RuntimeError: Connection closed by peer"}, {"error": "its process was ended by signal 11"}


@pytest.mark.parametrize(
    ("changes", "level", "says"),
    [
        ({}, OK, "torch 2.13.0+cpu is imported in 2.0 s"),
        ({"import_s": 60.0}, WARNING, "every rank waits as long"),
        ({"distributed": False}, ERROR, "was built without torch.distributed"),
        ({"backends": ["nccl"]}, ERROR, "this build of torch has nccl, but no gloo"),
        ({"torch": None}, ERROR, "torch is not imported: it did not answer within 9 s"),
        ({"devices": None}, ERROR, "what torch sees is not known: it did not answer within 9 s"),
        ({"devices": LOST}, ERROR, "the devices cannot be used: its process was ended by signal 11"),
        ({"devices": {"error": "runtime.device=tpu", "fix": "use runtime.device=cpu"}}, ERROR, "runtime.device=tpu"),
        ({"devices": NOTE}, OK, ""),
        ({"devices": NOTE | {"devices": [GPU | {"free": GiB}]}}, WARNING, "0: H100, 1.0 of 80.0 GiB are free: other"),
        ({"rank_1": None}, ERROR, "two ranks cannot sum a tensor: it did not answer within 9 s"),
        ({"rank_1": None, "ready_s": 7.5}, WARNING, "the devices needed 7.5 s, so that two ranks had only 1.5 s"),
        ({"rank_0": LATE, "rank_1": LOST | {"lost": True}}, ERROR, "rank 1: its process was ended by signal 11"),
        ({"rank_0": {"error": "ArithmeticError: an all-reduce gave 1"}}, ERROR, "rank 0: ArithmeticError"),
    ],
)  # fmt: skip
def test_torch_devices_and_ranks(changes, level, says):
    said = {name: value for name, value in {**SAID, **changes}.items() if value is not None}
    late = None in changes.values()
    found = torch_here.judge(Answers(said, "it did not answer within 9 s" * late, late, 9.0), {}, nvidia=False)
    check(found, level, says)
    assert (MORE_TIME in found[-1].fix) is late


@pytest.mark.parametrize(
    ("cuda", "env", "says"),
    [
        (None, {}, "torch 2.13.0+cpu is a build without CUDA"),
        ("13.0", {"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES= hides them"),
        ("13.0", {}, "built for CUDA 13.0, which the driver may be too old for"),
    ],
)
def test_gpus_that_torch_does_not_see(cuda, env, says):
    check(torch_here.judge(Answers(SAID | {"cuda": cuda}), env, nvidia=True), WARNING, says)


def test_torch_that_cannot_be_imported():
    end = "it ended with exit code 1: ImportError: libcudart.so.13"
    check(torch_here.judge(Answers(end=end), {}, nvidia=False), ERROR, f"torch cannot be imported: {end}")


def test_an_examination_that_fails_is_a_finding():
    def fails(why):
        raise why

    assert guarded("x", lambda: [ok("x", "fine")]) == [ok("x", "fine")]
    check(guarded("x", lambda: fails(ImportError("no psutil"))), ERROR, "cannot be imported (no psutil)")
    check(guarded("x", lambda: fails(OSError("odd"))), WARNING, "this could not be examined (OSError: odd)")


def test_the_summary_counts():
    good, odd, bad = ok("x", "fine"), warning("x", "odd", "mend it"), error("x", "bad", "mend it")
    assert doctor.summary([good]) == "nothing stops a run"
    assert doctor.summary([odd, good, odd]) == "nothing stops a run, 2 warnings"
    assert doctor.summary([bad]) == "1 error" and doctor.summary([bad, odd, bad]) == "2 errors, 1 warning"


def test_the_command_line(monkeypatch):
    task = doctor.read(["metrics.dir=/x y", "nproc=4", "--json", "runtime.device=cpu"], broken=False)
    assert (task.as_json, task.nproc, task.metrics_dir, task.runtime["device"]) == (True, 4, "/x y", "cpu")
    assert (task.limit_s, doctor.read(["limit_s=60"], broken=False).limit_s) == (options.LIMIT_S.default, 60)
    for words, says in ((["metrics.dirr=/x"], "metrics.dirr"), (["nproc=0"], "nproc=0"), (["--jso"], "--jso")):
        with pytest.raises(BadInput, match=says) as refused:
            doctor.read(words, broken=False)
        assert refused.value.exit_code == 2
        (found,) = doctor.read(words, broken=True).wrong
        check([found], ERROR, says)
    (found,) = doctor.read(["metrics.dir=${oc.env:NO_SUCH}"], broken=False).wrong
    check([found], ERROR, "the environment has no NO_SUCH")
    monkeypatch.setitem(sys.modules, "train.command.cli", None)
    monkeypatch.delattr("train.command.cli")
    (found,) = doctor.read([], broken=False).wrong
    check([found], ERROR, "no config can be composed (")


def test_the_doctor_itself_needs_no_package():
    command = [sys.executable, "-S", "-c", "import launch.doctor"]  # -S: no package is found
    assert subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=60).stderr == ""


@pytest.mark.parametrize(
    ("words", "code"), [(["metrics.dir=/proc/x"], 3), (["nproc=x"], 2), (["metrics.dir=/proc/x", "train.steps=0"], 2)]
)
def test_a_launcher_names_the_doctor_only_where_the_machine_is_to_blame(words, code, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["launch.local", *words])
    with pytest.raises(SystemExit) as ended:
        local.main()
    said = capsys.readouterr().err
    assert (ended.value.code, said.count(HINT), said.endswith(f"\n{HINT}\n")) == (code, int(code == 3), code == 3)


def run(tmp_path, *words, **env):
    """Run the doctor with a folder of its own for temporary files, in which nothing may stay."""
    (tmp_path / "temporary").mkdir()
    kept = {name: value for name, value in ENV.items() if name not in SET_BY_TORCHRUN and "SOCKET_IFNAME" not in name}
    command = [sys.executable, "-m", "launch.doctor", *words]
    done = subprocess.run(
        command,
        cwd=REPO,
        env=kept | {"TMPDIR": str(tmp_path / "temporary"), "COLUMNS": "120"} | env,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.stderr == "" and not [*(tmp_path / "temporary").iterdir()]
    return done


def no_constant(text):
    raise AssertionError(f"{text} is no JSON")


@pytest.mark.timeout(120)
def test_a_machine_in_good_order(tmp_path):
    done = run(tmp_path, "--json", "limit_s=90", f"metrics.dir={tmp_path / 'runs'}", "runtime.device=cpu")
    answer = json.loads(done.stdout, parse_constant=no_constant)
    assert (done.returncode, answer["exit_code"]) == (0, 0), done.stdout
    found = {one["subject"]: one for one in answer["findings"]}
    assert found.keys() == {
        "packages", "environment", "cores", "threads", "memory", "open files", "run directory", "temporary files",
        "/dev/shm", "host name", "connections", "emulated hosts", "torch", "backends", "devices", "all-reduce",
    }  # fmt: skip
    assert all(
        one["level"] in ("ok", "warning") and bool(one["fix"]) == (one["level"] != "ok") for one in found.values()
    )
    assert found["all-reduce"]["level"] == "ok" and found["all-reduce"]["values"]["all_reduce_ms"] > 0
    assert found["run directory"]["values"]["fsync_ms"] > 0 and not (tmp_path / "runs").exists()


@pytest.mark.timeout(120)
def test_a_machine_on_which_nothing_works(tmp_path):
    """Packages are broken, variables are left, the folder is none, and no name has an address: one answer, in words."""
    for name in ("torch", "psutil"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is broken')\n")
    left = {"WORLD_SIZE": "4", "MASTER_ADDR": NO_NAME, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPO)])}
    done = run(tmp_path, "limit_s=90", f"metrics.dir={tmp_path / 'torch.py' / 'runs'}", **left)
    assert done.returncode == 3 and "Traceback" not in done.stdout, done.stdout
    said = " ".join(done.stdout.split())
    for part in (
        "torch cannot be imported: it ended with exit code 1: ImportError: torch is broken fix:",
        "machine a package that a run needs cannot be imported (psutil is broken) fix:",
        "WORLD_SIZE=4, but no RANK, MASTER_PORT: launch.local ignores this",
        f"MASTER_ADDR={NO_NAME} has no address",
        "cannot be written (Not a directory) fix: use metrics.dir=FOLDER",
    ):
        assert part in said, (part, done.stdout)
    shown = done.stdout.replace(str(tmp_path), "FOLDER")  # a path is not broken
    assert said.count("fix:") >= 5 and max(map(len, shown.splitlines())) <= 120


HANGS = """
import os, socket, time
of_numbers = socket.getaddrinfo
def looked_up(host, *more, **how):
    return of_numbers(host, *more, **how) if host[0].isdigit() else time.sleep(600)
os.fsync, socket.getaddrinfo = lambda descriptor: time.sleep(600), looked_up
"""


@pytest.mark.timeout(60)
def test_a_machine_on_which_everything_hangs(tmp_path):
    """A disk, a name and torch: all are given up at the same time, so that the doctor ends within its limit."""
    (tmp_path / "sitecustomize.py").write_text(HANGS)
    (tmp_path / "torch.py").write_text("import time\ntime.sleep(600)\n")
    paths = os.pathsep.join([str(tmp_path), str(REPO)])
    done = run(tmp_path, "limit_s=3", f"metrics.dir={tmp_path / 'runs'}", PYTHONPATH=paths)
    said = " ".join(done.stdout.split())
    assert done.returncode == 3, done.stdout
    for part in (
        "could not be tried: it did not answer within",
        "has no address (it did not answer within",
        "torch is not imported: it did not answer within",
        MORE_TIME,
    ):
        assert part in said, (part, done.stdout)
