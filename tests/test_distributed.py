"""Process groups: the time-out of all of them, whoever creates them."""

import pytest

from tests.rows.base import BASE
from tests.running import job, run_jobs


@pytest.mark.timeout(120)
def test_every_group_waits_as_long_as_the_config_says(tmp_path):
    """This includes the groups that torch creates for a mesh, whose default is 30 minutes."""
    check = job("CHECK:waits", [*BASE, "strategy=fsdp_tp", "runtime.timeout_s=77"])
    found = run_jobs(tmp_path, [check], size=4, timeout_s=100)[check.name]
    assert "error" not in found, found["error"]
    assert found["groups"] >= 3  # the world, dp_shard, tp
    assert found["waits"] == [77.0]
