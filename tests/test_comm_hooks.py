"""PowerSGD starts at the given step, compresses, and its error feedback compensates for what it left out."""

import pytest

from tests.rows.base import BASE, F64
from tests.running import job, run_jobs
from train.command.cli import configured

RANK = 2


def test_what_a_hook_loses_is_bounded_as_stated():
    """The bound of a hook, which the rows of the table and the comparison of runs use."""
    bounds = {"fp16": 2e-3, "bf16": 2e-2, "powersgd": None}
    for hook, bound in bounds.items():
        lossy = configured(["strategy=dp", f"strategy.comm_hook={hook}"]).strategy.lossy()
        assert lossy is not None and lossy.bound == bound
    assert configured(["strategy=dp"]).strategy.lossy() is None


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    options = [f"strategy.powersgd_rank={RANK}", "strategy.powersgd_start_step=2", "train.steps=52"]
    overrides = [*BASE, "strategy=dp", "strategy.comm_hook=powersgd", *options, "model.num_layers=1"]
    overrides += ["train.global_batch_size=2", F64]
    check = job("CHECK:powersgd", overrides)
    result = run_jobs(tmp_path_factory.mktemp("powersgd"), [check], size=2, timeout_s=120)[check.name]
    assert "error" not in result, result["error"]
    return result


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_powersgd_starts_at_its_step(measured):
    assert len(measured["before"]) == 2
    assert max(measured["before"]) < 1e-12
    assert measured["largest_rank"] <= RANK
    assert measured["each"][0] > 0.1, "nothing was left out: it did not compress"


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_error_feedback_brings_the_running_sum_back(measured):
    means = measured["running_mean"]
    print("running mean, relative error after 10, 30, 50 steps:", means[9], means[29], means[-1])
    assert means[-1] < 0.25 * means[0]
    assert means[-1] < 0.25 * min(measured["each"]), "no single step came as near as the sum did"
