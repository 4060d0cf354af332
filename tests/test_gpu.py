"""The same table on one GPU: under nccl at world size 1, and with two gloo ranks that share the device.

gloo's send and receive do not move CUDA tensors, so pipelines of two ranks are left out there.
"""

import pytest
import torch

from tests.rows.base import BF16, COMPILED, F32, Row
from tests.test_equivalence import assert_green
from tests.worlds import prove

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ALONE = [
    Row(1, (f"strategy={name}",), options)
    for options in ((F32,), (BF16,), (F32, COMPILED))
    for name in ("dp", "fsdp", "tp", "pp")
] + [
    Row(1, ("strategy=cp", f"strategy.cp_method={method}"), options)
    for options in ((F32,), (BF16,), (F32, COMPILED))
    for method in ("allgather", "ring", "ulysses")
]
SHARED = [
    Row(2, (f"strategy={name}", *more), (F32,))
    for name, *more in (
        ("dp",),
        ("fsdp",),
        ("tp",),
        ("tp", "strategy.sequence_parallel=false"),
        ("tp", "strategy.loss_parallel=false"),
    )
] + [
    Row(2, ("strategy=cp", f"strategy.cp_method={method}"), options)
    for method in ("allgather", "ring", "ulysses")
    for options in ((F32,), (BF16,))
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return prove(tmp_path_factory.mktemp("alone"), ALONE, ["runtime.device=cuda", "runtime.backend=nccl"])


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return prove(tmp_path_factory.mktemp("shared"), SHARED, ["runtime.device=cuda", "runtime.backend=gloo"])


@pytest.mark.parametrize("row", ALONE, ids=lambda row: row.name)
def test_degree_one_under_nccl(row, alone):
    assert_green(alone[row.name])


@pytest.mark.parametrize("row", SHARED, ids=lambda row: row.name)
def test_two_ranks_on_one_gpu(row, shared):
    assert_green(shared[row.name])
