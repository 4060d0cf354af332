"""Faults that are planted in an elastic run: a rank ends within a save, and errors that end the whole run."""

import re

import pytest

from scripts.kill_ranks import BOUND, difference, records
from tests import faults
from train.checkpoint.folder import complete
from train.config.problems import EXIT_STOPPED


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "fault", ["killed_while_writing", "killed_before_the_manifest", "killed_before_latest", "not_finite"]
)
def test_a_fault_at_a_save_or_of_the_numbers(fault, tmp_path):
    """The others make the save up. A loss that is not finite ends the run, with or without lost ranks."""
    words = ("precision=float64", "model.dropout=0", "train.steps=20")
    curves = []
    for name, more in (("none", ()), (fault, ("runtime.elastic=true",))):
        folder = tmp_path / name
        folder.mkdir()
        code, errors = faults.Run(folder, name, *words, *more).end()
        run = faults.run_in(folder)
        curves.append(records(folder))
        if name == "not_finite":
            assert code == EXIT_STOPPED and "step 5: train/loss=nan" in errors and "again" not in errors, errors
            assert faults.life_of(run).state == "stopped"
            return
        assert code == 0, errors
        assert [path.name for path in complete(run)] == ["step-20", "step-16"]
        assert not [path for path in (run / "checkpoints").iterdir() if ".tmp" in path.name]
    assert difference(curves[1], curves[0]) <= BOUND
    assert errors.count("was ended by SIGKILL and is started again") == 1, errors


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_replica_goes_on_when_the_other_one_is_broken(tmp_path):
    """A rank of hsdp ends when some ranks have made an update and others have not: those make it too. The replica comes
    back when it is whole."""
    words = ("strategy=hsdp", "strategy.dp_replicate=2", "precision=float64", "model.dropout=0", "train.steps=240")
    curves = []
    for fault, more in (("none", ()), ("half_voted", ("runtime.elastic=true",))):
        folder = tmp_path / fault
        folder.mkdir()
        run = faults.Run(folder, fault, *words, "checkpoint.every=20", *more, nproc=4)
        code, errors = run.end()
        assert code == 0 and "Traceback" not in errors, errors
        curves.append(records(folder))
    assert difference(curves[1], curves[0]) <= BOUND
    lost, (back, step) = re.findall(r"^ranks 2, 3 (lost|back) after step (\d+)", run.out(), re.M)
    assert lost == ("lost", "10") and back == "back" and int(step) % 20 == 0
    ranks = {one["step"]: one["elastic/ranks"] for one in curves[1] if "elastic/ranks" in one}
    assert (ranks[9], ranks[12], ranks[240]) == (4, 2, 4)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_error_of_a_rank_ends_the_run_with_one_traceback(tmp_path):
    code, errors = faults.Run(tmp_path, "raises", "runtime.elastic=true").end()
    assert code == 1 and errors.count("RuntimeError: a planted error") == 1, errors
    assert "again" not in errors
