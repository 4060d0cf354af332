"""What is saved of a run, how large it is, and how a run ends that fails or gets a signal."""

import math
import signal
import subprocess
import sys
from contextlib import nullcontext
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from tests.saved_runs import ENV, SMALL
from train.checkpoint import checkpoints
from train.checkpoint.checkpoints import Checkpoints, state_bytes
from train.checkpoint.saver import Facts, Saver, all_finite
from train.command import cli
from train.command.process.signals import Signals
from train.config.problems import BadInput
from train.config.world import World
from train.data.corpus import load_corpus
from train.ranks.side_group import SideGroup
from train.ranks.state import Piece

MiB = 2**20


class Saves:
    saved = restore = own_state = load_own_state = print


@pytest.mark.parametrize("step", [Saves(), object()])
def test_a_run_needs_room_on_the_disk_only_if_it_saves(step, tmp_path, monkeypatch):
    words = [f"metrics.dir={tmp_path}", "checkpoint.every=500", "checkpoint.mode=async", "runtime.timeout_s=7"]
    config, tree, _ = cli.parse(cli.parser("train/main.py", ""), words)
    corpus, side = load_corpus(config), SideGroup(World.single())
    found = checkpoints.start_of(config, tree, corpus, 2**20, side, "cuda", step)
    says = "a checkpoint has 12.0 MiB; no rank may need longer than runtime.timeout_s=7 s to write its part, whose copy"
    assert [line.startswith(says) for line in found.said] == [True] * isinstance(step, Saves)
    with pytest.raises(BadInput, match="need more than the disk") if isinstance(step, Saves) else nullcontext():
        checkpoints.start_of(config, tree, corpus, 2**60, side, "cuda", step)


def test_an_asynchronous_save_copies_what_a_step_still_changes(tmp_path):
    def piece(name, copied):
        return Piece(name, "parameter", (2,), (0,), torch.zeros(2), copied=copied)

    no_step: Any = None
    live, copy = piece("live", False), piece("copy", True)
    saver = Saver(cli.configured([]).checkpoint, tmp_path, Facts({}, {}, {}, ""), no_step, SideGroup(World.single()))
    first, second = saver._copied([live, copy])
    live.tensor.add_(1)
    assert first.tensor.tolist() == [0, 0] and second.tensor is copy.tensor and [*saver.staging] == [live.key]


@pytest.mark.parametrize(("bad", "finite"), [(1.0, True), (3e38, True), (math.inf, False), (math.nan, False)])
def test_numbers_are_finite_also_if_their_sum_is_not(bad, finite):
    tensors = [torch.full((3,), bad), torch.tensor([bad, -bad]), torch.ones(2, 2)]
    assert all_finite(tensors) is finite and all_finite([])


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        ([], 3),  # the weight and two moments
        (["optim=sgd"], 1),
        (["optim=sgd", "optim.momentum=0.9"], 2),
        (["strategy.comm_hook=powersgd"], 3 + 4),  # what each rank has kept back
        (["strategy.comm_hook=bf16"], 3),
    ],
)
def test_the_size_of_a_checkpoint(words, numbers):
    config = cli.configured(["strategy=dp", *words])
    assert state_bytes(config, MiB, 4) == numbers * 4 * MiB


@pytest.mark.parametrize(
    ("good_step", "code", "says"),
    [
        (4, 75, "checkpoint saved at step 4: SIGTERM ended the run; the same command line continues it\n"),
        (2, 143, "SIGTERM ended the run at step 4, whose state was not saved\n"),  # it was not finite
    ],
)
def test_a_signal_says_only_what_was_saved(good_step, code, says, tmp_path, capsys):
    run = object.__new__(Checkpoints)
    run.config, run.run, run.saver = cli.configured([]), tmp_path, Mock(good_step=good_step)
    run.report, run.side, run.signals = Mock(), Mock(), Mock()
    with pytest.raises(SystemExit) as ended:
        run._leave(4, signal.SIGTERM)
    assert (ended.value.code, capsys.readouterr().err) == (code, says)
    assert run.report.living.end.called is (code == 75), "without its state, a run is one that was cut off"


FAILS = """
import sys
from train import main
from train.measure.sampling import Sampler
from train.record.sinks import JsonLines

def fails(*args):
    raise RuntimeError("planted")

JsonLines.close = lambda self: print("closed", flush=True)
if sys.argv.pop(1) == "fails":
    Sampler.__init__ = fails
main.main()
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("how", "code"), [("fails", 1), ("succeeds", 0)])
def test_sinks_are_closed_once_also_if_a_run_fails_at_its_start(how, code, tmp_path):
    line = [sys.executable, "-c", FAILS, how, *SMALL, "train.steps=1", "checkpoint.every=0"]
    done = subprocess.run(line, cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout.count("closed")) == (code, 1), done.stderr


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_a_signal_is_noted(name):
    number = signal.Signals[name]
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with Signals() as signals:
            assert signal.getsignal(number) == signals._note
            signal.raise_signal(number)
        assert signals.number == number and signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
