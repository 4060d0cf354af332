"""Trackers: a named tracker gets values, hyperparameters and summary; one that fails does not stop the training."""

import importlib.util
import sqlite3

import pytest

from train.command import cli
from train.config.problems import EXIT_ENVIRONMENT, BadInput
from train.config.schema import Tracker
from train.record import trackers
from train.record.board import hparams

STEPS = {1: 5.5, 2: 4.25, 3: 3.125}


def config_of(*overrides):
    return cli.parse(cli.parser("test", ""), ["strategy=single", *overrides])[0]


def mlflow_losses(folder):
    import mlflow

    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(trackers.PROJECT)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "single-ws1-abc"
    assert run.info.status == "FINISHED"
    assert run.data.params["strategy"] == "single"
    assert run.data.metrics["summary/perf/step_ms"] == 12.5
    assert not any(name.startswith("memory_by_rank") for name in run.data.metrics)
    return {point.step: point.value for point in client.get_metric_history(run.info.run_id, "train/loss")}


def wandb_losses(folder):
    (log,) = folder.glob("wandb/offline-run-*/*.wandb")  # its own format has no public reader
    written = log.read_bytes()
    assert b"summary/perf/step_ms" in written
    assert b"memory_by_rank" not in written
    return {step: loss for step, loss in STEPS.items() if str(loss).encode() in written}


def trackio_losses(folder):
    (database,) = folder.glob("**/*.db")
    rows = sqlite3.connect(database).execute("select step, json_extract(metrics, '$.\"train/loss\"') from metrics")
    return {step: loss for step, loss in rows if loss is not None}


READERS = {"mlflow": mlflow_losses, "wandb": wandb_losses, "trackio": trackio_losses}


@pytest.mark.timeout(100)
@pytest.mark.parametrize("name", READERS)
def test_a_tracker_gets_what_the_run_measured(name, tmp_path, monkeypatch):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    monkeypatch.chdir(tmp_path)
    offline = {"MLFLOW_TRACKING_URI": (tmp_path / "mlruns").as_uri(), "MLFLOW_ALLOW_FILE_STORE": "true",
               "MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path),
               "TRACKIO_DIR": str(tmp_path / "trackio")}  # fmt: skip
    for key, value in offline.items():
        monkeypatch.setenv(key, value)
    config = config_of(f"metrics.trackers=[{name},{name}]")
    (sink,) = trackers.open_trackers(config, "single-ws1-abc", hparams(config, 1, "cpu"))
    for step, loss in STEPS.items():
        sink.write(step, {"train/loss": loss, "memory_by_rank/parameters_mib/rank_0": 1.0})
    sink.write(3, {"validation/loss": 3.5})
    sink.summary({"strategy": "single", "perf/step_ms": 12.5})
    sink.close()
    assert not sink.failed
    assert READERS[name](tmp_path) == STEPS


class Broken(trackers.TrackerSink):
    name = "broken"

    def open(self, run, hparams):
        self.calls = 0

    def log(self, step, values):
        self.calls += 1
        raise ConnectionError("no route to host\nsome more")

    def log_summary(self, values):
        self.log(0, values)

    def end(self):
        self.log(0, {})


def test_a_tracker_that_fails_is_left_out_and_said_once(capsys):
    sink = Broken("run", {})
    sink.write(1, {"train/loss": 1.0})
    sink.write(2, {"train/loss": 1.0})
    sink.close()
    assert sink.calls == 1
    assert capsys.readouterr().err == "broken failed and is not used any more: no route to host\n"


def test_one_that_cannot_start_or_is_not_installed_or_not_known(monkeypatch):
    class Refused(Broken):
        def open(self, run, hparams):
            raise PermissionError("no key")

    monkeypatch.setitem(trackers.SINKS, Tracker.wandb, Refused)
    with pytest.raises(BadInput, match=r"metrics.trackers=\[wandb\] cannot start \(no key\)") as found:
        trackers.open_trackers(config_of("metrics.trackers=[wandb]"), "run", {})
    assert found.value.exit_code == EXIT_ENVIRONMENT
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput) as found:
        cli.check(config_of("metrics.trackers=[mlflow]"), 1)
    assert found.value.exit_code == EXIT_ENVIRONMENT
    hint = 'metrics.trackers=[mlflow] needs mlflow, which is not installed: pip install "strategy-lab[mlflow]"'
    assert str(found.value) == hint
    with pytest.raises(BadInput, match=r"metrics.trackers.*'pigeon'") as found:
        config_of("metrics.trackers=[pigeon]")
    assert found.value.exit_code == 2
