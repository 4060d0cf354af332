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


CASES = [("true", 1), ("true", 2), ("false", 2)]


@pytest.fixture(scope="module")
def found():
    """How often each collective is used, by case. One process compiles them all."""
    words = [f"strategy.async_tp={async_tp} train.micro_batch_size={rows}" for async_tp, rows in CASES]
    command = [sys.executable, "-m", "tests.fused_worker", *words]
    run = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stdout.splitlines() if line.startswith("{")]
    return dict(zip(CASES, map(json.loads, lines), strict=True))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("async_tp", "rows"), CASES)
def test_collectives_are_fused_with_products(async_tp, rows, found):
    """With one sequence in a microbatch its parts are split, with two whole ones: each has patterns of its own."""
    used, unused = (FUSED, PLAIN) if async_tp == "true" else (PLAIN, FUSED)
    counts = found[async_tp, rows]
    # attention and feed-forward; unfused, the step goes on and the backward has two of each too
    assert [counts.get(name, 0) for name in used] == ([2, 2] if async_tp == "true" else [4, 4])
    assert not any(counts.get(name) for name in unused)
