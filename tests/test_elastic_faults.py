"""Faults that are planted in an elastic run: ranks end within a save or a vote, and an error ends the run."""

import re

import pytest

from scripts.kill_ranks import BOUND, difference, records
from tests import faults
from train.checkpoint.folder import complete

PLAIN = ("precision=float64", "model.dropout=0", "optim.schedule=constant")  # the curve does not depend on the ranks
ELASTIC = (*PLAIN, "runtime.elastic=true")
HSDP = ("strategy=hsdp", "strategy.dp_replicate=2")
FAULTS = ("killed_while_writing", "killed_before_the_manifest", "killed_before_latest")
STEPS, VALIDATES = 100, 10

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The records of a run on one rank, without a fault."""
    folder = tmp_path_factory.mktemp("alone")
    code, errors = faults.Run(folder, "none", *PLAIN, f"train.steps={STEPS}", "checkpoint.every=0", nproc=1).end()
    assert code == 0, errors
    return records(folder)


def first(found, steps):
    return [one for one in found if one["step"] <= steps]


def test_ranks_are_killed_at_moments_of_a_save(alone, tmp_path):
    """One after the other, each while those that are left make up the save that the last one has prevented."""
    run = faults.Run(tmp_path, ",".join(FAULTS), *ELASTIC, f"train.steps={2 * VALIDATES}", nproc=4)
    code, errors = run.end()
    assert code == 0 and "Traceback" not in errors, errors
    assert sorted(path.name for path in run.faults.iterdir()) == sorted(FAULTS)
    assert errors.count("was ended by SIGKILL and is started again") == len(FAULTS), errors
    found = faults.run_in(tmp_path)
    assert [path.name for path in complete(found)] == ["step-20", "step-16"]
    assert not [path for path in found.rglob("*") if ".tmp" in path.name]
    assert difference(records(tmp_path), first(alone, 2 * VALIDATES)) <= BOUND


def test_a_replica_goes_on_when_the_other_one_is_broken(alone, tmp_path):
    """A rank of hsdp ends when some ranks have made an update and others have not: those make it too. The replica comes
    back when it is whole; without checkpoints, after any step."""
    run = faults.Run(tmp_path, "half_voted", *ELASTIC, *HSDP, f"train.steps={STEPS}", "checkpoint.every=0", nproc=4)
    code, errors = run.end()
    assert code == 0 and "Traceback" not in errors, errors
    assert difference(records(tmp_path), alone) <= BOUND
    lost, (back, _) = re.findall(r"^ranks 2, 3 (lost|back) after step (\d+)", run.out(), re.M)
    assert lost == ("lost", "10") and back == "back"
    ranks = {one["step"]: one["elastic/ranks"] for one in records(tmp_path) if "elastic/ranks" in one}
    assert (ranks[8], ranks[12], ranks[STEPS]) == (4, 2, 4)


def test_an_error_of_a_rank_ends_the_run_with_one_traceback(tmp_path):
    code, errors = faults.Run(tmp_path, "raises", "runtime.elastic=true").end()
    assert code == 1 and errors.count("RuntimeError: a planted error") == 1, errors
    assert "again" not in errors
