"""Groups of processes: how long they wait, whoever makes them."""

import pytest

from launch.world import run_world
from tests.rows.base import BASE
from train.prove import Job


@pytest.mark.timeout(120)
def test_every_group_waits_as_long_as_the_config_says(tmp_path):
    """Also those that torch makes for a mesh, which it would have wait for 30 minutes."""
    job = Job("CHECK:waits", [*BASE, "strategy=fsdp_tp"])
    found = run_world(tmp_path, [job], size=4, runtime=["runtime.timeout_s=77"], timeout_s=100, worker="tests.worker")[
        job.name
    ]
    assert "error" not in found, found["error"]
    assert found["groups"] >= 3  # the world, dp_shard, tp
    assert found["waits"] == [77.0]
