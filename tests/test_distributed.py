"""Process groups: the time-out of all of them, whoever creates them; and the settings of CUDA's allocator."""

import os
import subprocess
import sys

import pytest

from tests.rows.base import BASE
from tests.running import job, run_jobs
from tests.started import REPO
from train.ranks.distributed import ALLOCATOR, let_segments_grow

GROWN = """
import torch
from train.config.schema import RuntimeConfig
from train.config.world import World
from train.ranks.distributed import choose_runtime

tensor = torch.zeros(2**20, device=choose_runtime(RuntimeConfig(), World.single()).device)
print({one["is_expandable"] for one in torch.cuda.memory._snapshot()["segments"]})
"""


@pytest.mark.parametrize(
    ("given", "after"),
    [
        ({}, {ALLOCATOR: "expandable_segments:True"}),
        ({ALLOCATOR: ""}, {ALLOCATOR: ""}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}),
    ],
)
def test_segments_grow_unless_the_environment_has_settings(given, after):
    let_segments_grow(given)
    assert given == after


@pytest.mark.gpu
@pytest.mark.timeout(120)
def test_segments_grow_on_a_gpu():
    env = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")}
    run = subprocess.run([sys.executable, "-c", GROWN], cwd=REPO, env=env, capture_output=True, text=True, timeout=100)
    assert run.stdout == "{True}\n", run.stderr


@pytest.mark.timeout(120)
def test_every_group_waits_as_long_as_the_config_says(tmp_path):
    """This includes the groups that torch creates for a mesh, whose default is 30 minutes."""
    check = job("CHECK:waits", [*BASE, "strategy=fsdp_tp", "runtime.timeout_s=77"])
    found = run_jobs(tmp_path, [check], size=4, timeout_s=100)[check.name]
    assert "error" not in found, found["error"]
    assert found["groups"] >= 3  # the world, dp_shard, tp
    assert found["waits"] == [77.0]
