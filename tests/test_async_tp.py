"""Async TP: inductor fuses each gather and each reduce-scatter of a block with the products beside it.

Running the fused operators needs NCCL and two GPUs of one NVLink domain. This test shows only that they are used.
"""

import json
import os
import subprocess
import sys

import pytest

ENV = os.environ | {"OMP_NUM_THREADS": "1"}
FUSED = ("symm_mem.fused_all_gather_matmul.default", "symm_mem.fused_matmul_reduce_scatter.default")
PLAIN = ("_c10d_functional.all_gather_into_tensor.default", "_c10d_functional.reduce_scatter_tensor.default")


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("async_tp", "rows", "used", "unused"),
    [("true", 1, FUSED, PLAIN), ("true", 2, FUSED, PLAIN), ("false", 2, PLAIN, FUSED)],
)
def test_collectives_are_fused_with_products(async_tp, rows, used, unused):
    """With one sequence in a microbatch its parts are split, with two whole ones: each has patterns of its own."""
    words = [f"strategy.async_tp={async_tp}", f"train.micro_batch_size={rows}"]
    command = [sys.executable, "-m", "tests.fused_worker", *words]
    run = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    # attention and feed-forward; unfused, the step goes on and the backward has two of each too
    assert [found.get(name, 0) for name in used] == ([2, 2] if async_tp == "true" else [4, 4])
    assert not any(found.get(name) for name in unused)
