"""Bad input: one message with the value, the rule and the fix; exit code 2 or 3; no traceback; nothing started."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pytest
import torch

from launch import local

REPO = Path(__file__).resolve().parent.parent
ENV = os.environ | {"OMP_NUM_THREADS": "1"}
NO_GPU = not torch.accelerator.is_available()

# arguments -> (exit code, what the message says, what the fix says)
COMMAND_LINES = {
    "strategy=foo": (2, "strategy=foo does not name a preset", "strategy=3d|"),
    "train.stepss=3": (2, "train.stepss is not a key", "--help"),
    "+train.stepss=3": (2, "train.stepss is not a key", "--help"),
    "+strategy.typo=1": (2, "strategy.typo is not a key", "--help"),
    "~strategy": (2, "~strategy does not name a preset", "strategy="),
    "train.steps=abc": (2, "train.steps: Value 'abc'", "--help"),
    "train.steps=1e3": (2, "train.steps: Value '1000.0'", "--help"),
    "train.steps=-5": (2, "train.steps=-5 is out of range", ">= 1"),
    "optim.lr=nan": (2, "optim.lr=nan is out of range", "finite"),
    "strategy=null": (2, "strategy=null does not name a preset", "strategy="),
    "precision=fp7": (2, "precision: Invalid value 'fp7'", "bf16"),
    "nproc=4 strategy.tp=2": (2, "tp 2 needs 2 processes, but there are 4", "nproc=2"),
    "nproc=6 strategy=fsdp_tp strategy.tp=4": (2, "does not divide 6 processes", "nproc=4"),
    "nproc=4 strategy=single": (2, "strategy=single runs on 1 process", "nproc=1"),
    "nproc=4 strategy=dp strategy.tp=2": (2, "DDP", "strategy.dp_shard=-1"),
    "nproc=4 model.num_heads=6 model.num_kv_heads=2 model.dim=96": (2, "model.num_heads=6 is not div", "nproc=2"),
    "nproc=4 model.num_heads=12 model.dim=96 model.num_kv_heads=6": (
        2,
        "model.num_kv_heads=6 and strategy.tp=4: neither divides the other",
        "nproc=2",
    ),
    "nproc=4 model.ffn_dim=350": (2, "model.ffn_dim=350 is not divisible by strategy.tp=4", "nproc=2"),
    "nproc=4 strategy=pp model.num_layers=2": (
        2,
        "model.num_layers=2 is fewer than",
        "model.num_layers=4",
    ),
    "nproc=4 strategy=pp train.global_batch_size=2": (2, "2 microbatches", "train.global_batch_size=4"),
    "nproc=2 strategy=pp strategy.schedule=2f2b": (2, "2f2b is none of gpipe, 1f1b", "use strategy.schedule=1f1b"),
    "nproc=2 strategy.async_tp=true": (2, "async_tp=true needs compile.enabled=true", "compile.enabled=true"),
    "nproc=3 strategy=dp": (2, "train.global_batch_size=8 is not divisible by", "train.global_batch_size=6"),
    "data=text": (2, "data=text needs a path", "data.path=FILE"),
    "data=text data.path=/no/such/file": (2, "does not exist", "data.path=/no/such/file"),
    "data=text data.path={empty}": (2, "is empty", "with text in it"),
    "data=text data.path={short}": (2, "but train.seq_len=128 needs 129", "more data"),
    "data=tokens data.path={foreign}": (2, "contains token id 999, but model.vocab_size=256", "model.vocab_size=1000"),
    "data=text data.path={same} data.ignore_token=97": (
        2,
        "every target of the training part",
        "data.ignore_token or null",
    ),
    "metrics.dir={short}": (3, "short.txt cannot be written (Not a directory)", "metrics.dir=FOLDER"),
    "-m strategy=dp,tp": (2, "-m/--multirun", "one torchrun per run"),
    "--frobnicate": (2, "unrecognized arguments: --frobnicate", "--help"),
    "metrics.trackers=[pigeon]": (2, "pigeon", "--help"),
    "nproc=none": (2, "nproc=none is not valid: nproc must be a positive integer", "nproc=4"),
    "restarts=-1": (2, "restarts=-1 is not valid: restarts must be a whole number from 0", "restarts=3"),
    "runtime.device=teapot": (3, "no teapot device", "runtime.device=auto"),
    "runtime.backend=pigeon": (3, "runtime.backend=pigeon is not known", "gloo"),
    "port={taken}": (3, "cannot be used", "use another"),
}
WITHOUT_GPU = {
    "nproc=2 strategy.async_tp=true compile.enabled=true": (3, "async_tp=true needs nccl", "strategy.async_tp=false"),
    "runtime.backend=nccl": (3, "runtime.backend=nccl needs a cuda device", "runtime.backend=auto"),
    "nproc=2 runtime.device=cuda": (3, "no cuda device", "runtime.device=auto"),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "empty.txt").touch()
    (folder / "short.txt").write_text("too short")
    (folder / "same.txt").write_text("a" * 5000)
    np.full(5000, 999, dtype="<u2").tofile(folder / "foreign.bin")
    taken = socket.create_server(("127.0.0.1", 0))
    with taken:
        yield {
            "empty": folder / "empty.txt",
            "short": folder / "short.txt",
            "same": folder / "same.txt",
            "foreign": folder / "foreign.bin",
            "taken": taken.getsockname()[1],
        }


def check_message(text, says, fix):
    assert "Traceback" not in text
    assert text.count("nothing was trained") == 1
    assert says in text
    assert fix in text


@pytest.mark.timeout(60)
@pytest.mark.parametrize("line", [*COMMAND_LINES, *(WITHOUT_GPU if NO_GPU else {})])
def test_launch_local_answers_once(line, places, tmp_path, monkeypatch, capfd):
    code, says, fix = (COMMAND_LINES | WITHOUT_GPU)[line]
    monkeypatch.setattr(sys, "argv", ["launch.local", *line.format(**places).split()])
    monkeypatch.setattr(local, "run_here", lambda *_, **__: pytest.fail("torchrun was started"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        local.main()
    out, err = capfd.readouterr()
    assert ended.value.code == code, err
    check_message(err, says, fix)
    assert out == ""
    assert not list(tmp_path.iterdir()), "something was started"


@pytest.mark.timeout(60)
def test_launch_local_answers_as_a_process(tmp_path):
    command = [sys.executable, "-m", "launch.local", "nproc=4", "strategy=single"]
    run = subprocess.run(command, cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=50)
    assert (run.returncode, run.stdout) == (2, "")
    check_message(run.stderr, *COMMAND_LINES["nproc=4 strategy=single"][1:])


def torchrun(*arguments, nproc, cwd):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    command += [str(REPO / "train" / "main.py"), *arguments]
    process = subprocess.Popen(
        [command[0], "-X", "faulthandler", *command[1:]], cwd=cwd, env=ENV, text=True, stdout=PIPE, stderr=PIPE
    )
    try:
        out, err = process.communicate(timeout=100)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # torchrun then prints where each of its threads is
        raise AssertionError("torchrun does not end: " + process.communicate(timeout=10)[1]) from None
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("line", "code", "says", "fix"),
    [
        ("strategy=foo", 2, "strategy=foo does not name a preset", "strategy=3d|"),
        ("-m strategy=dp", 2, "-m/--multirun", "one torchrun per run"),
        ("runtime.device=teapot", 3, "no teapot device", "runtime.device=auto"),
    ],
)
def test_torchrun_says_it_once(line, code, says, fix, tmp_path):
    run = torchrun(*line.split(), nproc=2, cwd=tmp_path)
    assert run.returncode == 1  # torchrun's own
    ours = re.split(r"\n.*torch/distributed/elastic|\nE\d{4} ", run.stderr)[0]
    assert "Traceback" not in ours
    assert run.stderr.count("nothing was trained") == 1
    assert says in run.stderr
    assert fix in run.stderr
    codes = set(re.findall(r"exitcode\s*: (-?\d+)", run.stderr))
    assert str(code) in codes and codes <= {str(code), "-15"}  # torchrun ends a rank that is still starting


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("flag", "key"), [("--help", "train.micro_batch_size="), ("--cfg=job", "micro_batch_size:")])
def test_help_and_config_come_from_one_rank(flag, key, tmp_path):
    run = torchrun(flag, nproc=2, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(key) == 1


@pytest.mark.timeout(60)
def test_a_bad_end_leaves_the_terminal_as_it_was(tmp_path):
    """The progress bar has ended, and the cursor is restored, before the message is printed."""
    main, own = os.openpty()
    line = ["strategy=single", "optim=sgd", "optim.lr=1e30", "train.steps=9", "model.num_layers=1"]
    command = [sys.executable, str(REPO / "train" / "main.py"), *line]
    run = subprocess.Popen(command, cwd=tmp_path, env=ENV | {"TERM": "xterm"}, stdout=own, stderr=own)
    os.close(own)
    seen = b""
    while chunk := read_from(main):
        seen += chunk
    os.close(main)
    assert run.wait(timeout=10) == 6
    assert b"\x1b[?25l" in seen, "the cursor is hidden while the bar moves"
    shown = seen.rindex(b"\x1b[?25h")
    assert b"\x1b[?25l" not in seen[shown:]
    assert seen[shown:].count(b"train.on_nonfinite=ignore") == 1 and b"Traceback" not in seen


def read_from(terminal):
    try:
        return os.read(terminal, 4096)
    except OSError:  # Linux says so where the other end is closed
        return b""
