"""Values that a config takes from the environment: a run uses them, and its files do not show them."""

import json
import re
from typing import Any

import pytest
from omegaconf import OmegaConf

from launch.sweeping.grid import check_all, expand
from launch.sweeping.points import State
from train.command import as_typed, cli
from train.record.run_dir import make_run_dir, work, work_hash, write_work


@pytest.mark.timeout(60)
def test_what_the_environment_holds_is_used_and_not_written(tmp_path, monkeypatch):
    secrets = {"PLACE": "geheim", "SIZE": "48271", "PART": "0.12345", "ID": "77123", "STEPS": "4242"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    words = [
        "data=text", "data.path=${oc.env:PLACE}/x", "train.seed=${oc.env:SIZE}", f"metrics.dir={tmp_path}",
        "data.validation_fraction=${oc.env:PART}", "data.ignore_token='${oc.decode:${oc.env:ID}}'",
        "runtime.device=${data.path}", "train.steps=${oc.env:STEPS}",
    ]  # fmt: skip
    config, tree, _ = cli.parse(cli.parser("test", ""), words)
    assert (config.data.path, config.train.seed, config.data.ignore_token) == ("geheim/x", 48271, 77123)
    run = make_run_dir(config, tree, {"tp": 1}, 1, str(tmp_path / "told"))
    typed = as_typed.from_environment(tree)
    write_work(run, config, "0" * 64, {"tp": 1}, typed, world_size=1)
    assert (tmp_path / "told").read_text() == f"{run}\n"
    written = "".join(file.read_text() for file in run.iterdir())
    assert not [value for value in secrets.values() if value in written]
    raw: Any = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"), resolve=False)
    assert (raw["data"]["path"], raw["train"]["seed"]) == ("${oc.env:PLACE}/x", "${oc.env:SIZE}")
    assert (raw["runtime"]["device"], raw["model"]["max_seq_len"]) == ("${data.path}", 128)
    shown = json.loads((run / "work.json").read_text())
    seed = next(one for one in typed if one.key == "train.seed")
    assert re.fullmatch("sha256:[0-9a-f]{12}", seed.digest)
    assert shown["work"]["train"]["seed"] == seed.digest
    assert shown["work_hash"] == work_hash(config, "0" * 64), "of the values: however they were given"
    assert work(config, "")["train"]["seed"] == 48271
    assert OmegaConf.create({"x": "${oc.env:PLACE}"}).x == "geheim", "the resolver is as it was"

    def sweep():
        return State.of(tmp_path, check_all(cli.parser("test", ""), expand(words), "global"), "global", "", None).folder

    before, again = sweep(), sweep()
    monkeypatch.setenv("PLACE", "elsewhere")
    assert before == again != sweep(), "other values are another sweep's"
    assert make_run_dir(*cli.parse(cli.parser("test", ""), words)[:2], {"tp": 1}, 1).name != run.name


def test_what_the_environment_holds_is_left_out_where_it_is_not_shown(monkeypatch):
    """A value inside a list, of a group that is not in the container: nothing is replaced, and nothing raises."""
    monkeypatch.setenv("TRACKER", "mlflow")
    tree = cli.parse(cli.parser("test", ""), ["metrics.trackers=[${oc.env:TRACKER}]"])[1]
    (typed,) = as_typed.from_environment(tree)
    shown = {"train": {"seed": 1}}
    as_typed.put(shown, typed.path, typed.digest)
    assert shown == {"train": {"seed": 1}}
