"""The parts of an elastic run that need no processes: rows of a batch, what is written again, and what is refused."""

import json
import logging
import math
from contextlib import closing
from types import SimpleNamespace
from typing import cast
from unittest import mock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.device_mesh import DeviceMesh

from train.command import cli
from train.command.validate import validate
from train.config.fields import IGNORE_INDEX
from train.config.strategy import TrainStep
from train.config.world import World
from train.data.corpus import load_corpus
from train.measure.metrics import Metrics, NonFinite
from train.ranks.batches import Batches
from train.ranks.elastic.carried import Carried, Made
from train.ranks.side_group import SideGroup
from train.record.sinks import JsonLines, TensorBoard

CPU = torch.device("cpu")


def config_of(*overrides):
    return cli.parse(cli.parser("test", ""), ["strategy=dp", "train.seq_len=16", *overrides])[0]


def place(rank, size):
    """Stands for the mesh of a rank of data parallelism."""
    axes = {"dp_replicate": (rank, size), "dp_shard": (0, 1)}
    return cast(
        DeviceMesh,
        {name: SimpleNamespace(size=lambda n=n: n, get_local_rank=lambda at=at: at) for name, (at, n) in axes.items()},
    )


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_ranks_share_a_batch_in_whole_microbatches(micro, size):
    config = config_of("train.global_batch_size=8", f"train.micro_batch_size={micro}", "train.eval_batches=1")
    corpus = load_corpus(config)
    ranks = [Batches(config, corpus, place(rank, size), CPU) for rank in range(size)]
    for whole, parts in (
        (corpus.batch(3, 8, slice(0, 8)), [one.training(3) for one in ranks]),
        (corpus.validation_batch(0, 1, 8, slice(0, 8)), [one.validation(0) for one in ranks]),
    ):
        assert len({len(tokens) for tokens, _ in parts}) == 1 and len(parts[0][0]) % micro == 0
        tokens, targets = (torch.cat(each) for each in zip(*parts, strict=True))
        assert torch.equal(tokens[:8], whole[0]) and torch.equal(targets[:8], whole[1]), "every row once, in order"
        assert (targets[8:] == IGNORE_INDEX).all(), "the rows that fill up have nothing to predict"


class Evaluates:
    on_gradients = None

    def evaluate(self, tokens, targets):
        return torch.tensor(6.0), torch.tensor(2)

    def state_bytes(self):
        return {"parameters": 1, "gradients": 1, "optimiser": 1}


def made_up(folder, text, carried, *overrides):
    """The lines of metrics.jsonl after a rank has taken over a run whose file was `text`."""
    (folder / "metrics.jsonl").write_text(text)
    config = config_of("train.eval_every=2", "train.steps=9", *overrides)
    sink = JsonLines(folder, carried.step)
    metrics = Metrics(config, SideGroup(World.single()), CPU, cast(TrainStep, Evaluates()), [sink], sink.earlier)
    batches = Batches(config, load_corpus(config), place(0, 1), CPU)
    with closing(metrics):
        metrics.make_up(carried, batches)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


MADE = {step: Made(loss=float(step), grad_norm=1.0, lr=0.1, extras={"train/more": 2.0}) for step in (3, 4)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"step": 2, "train/loss": 2}\n{"step": 3, "trai', [2, 3, 4, 4]),
        ('{"step": 3, "train/loss": 3}\n', [3, 4, 4]),
        ('{"step": 4, "train/loss": 4}\n', [4, 4]),
        ('{"step": 4, "train/loss": 4}\n{"step": 4, "validation/loss": 3.0}\n', [4, 4]),
    ],
)
def test_what_a_lost_rank_has_not_written_is_written_once(text, expected, tmp_path):
    lines = made_up(tmp_path, text, Carried(4, {}, dict(MADE)))
    assert [line["step"] for line in lines] == expected
    losses = [line["train/loss"] for line in lines[:-1]]
    assert losses == expected[:-1] and lines[-1]["validation/loss"] == 3.0
    assert all("perf/step_ms" not in line for line in lines), "the time of such a step is not known"


def test_a_step_that_is_not_finite_stops_the_run_after_a_loss_too(tmp_path):
    carried = Carried(4, {}, MADE | {4: Made(math.nan, 1.0, 0.1, {})})
    with pytest.raises(NonFinite, match="step 4: train/loss=nan"):
        made_up(tmp_path, '{"step": 3, "train/loss": 3}\n', carried)
    made_up(tmp_path, '{"step": 3, "train/loss": 3}\n', carried, "train.on_nonfinite=ignore")


@pytest.mark.parametrize("steps_of_board", [2, 3])
@mock.patch("tensorboard.summary.writer.event_file_writer.os.getpid")
def test_tensorboard_has_each_step_once_if_a_process_was_killed_between_two_sinks(
    process, steps_of_board, tmp_path, caplog
):
    caplog.set_level(logging.ERROR)
    records = [(step, {"train/loss": float(step), "time/step_ms": 1.0}) for step in (1, 2, 3)]
    process.return_value = 9
    board = TensorBoard(tmp_path, {})
    for step, values in records[:steps_of_board]:
        board.write(step, values)
    board.close()
    process.return_value = 10  # so that its file comes first by name, if both are made in the same second
    board = TensorBoard(tmp_path, {}, after=3, earlier=records)
    board.write(4, {"train/loss": 4.0})
    board.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload()
    assert [(one.step, one.value) for one in events.Scalars("train/loss")] == [(n, float(n)) for n in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("strategy=fsdp", "needs copies of the whole state, but strategy=fsdp holds each part once"),
        ("strategy=zero1", "needs copies of the whole state"),
        ("strategy=tp", "needs copies of the whole state"),
        ("strategy=dp_pp", "needs copies of the whole state"),
        ("strategy=dp model=moe_tiny", "is not supported with a mixture of experts (model.num_experts="),
        ("strategy=dp strategy.comm_hook=powersgd", "is not supported with strategy.comm_hook=powersgd"),
        ("strategy=dp compile.enabled=true", "is not supported with compile.enabled=true"),
        ("strategy=dp metrics.trackers=[mlflow]", "is not supported with metrics.trackers=[mlflow]"),
    ],
)
def test_what_cannot_go_on_without_a_rank_is_refused(words, says):
    config = cli.parse(cli.parser("test", ""), [*words.split(), "runtime.elastic=true"])[0]
    found = [one for one in validate(config, 4) if one.rule.startswith("elastic")]
    assert len(found) == 1 and f"runtime.elastic=true {says}" in found[0].message, found
    assert "runtime.elastic=false" in found[0].fix
