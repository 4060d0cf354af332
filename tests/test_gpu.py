"""The equivalence table on one GPU: with NCCL at world size 1, and with two gloo ranks that share the device.

Send and receive of gloo do not support CUDA tensors, so there are no pipelines with two ranks.
"""

import pytest

from tests.rows.base import BF16, COMPILED, F32, F64, Row
from tests.running import run_rows
from tests.test_equivalence import assert_green

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
]

# every technique at degree 1: its real code path, over nccl
DEGREE_ONE = (
    ("dp",),
    ("dp", "strategy.comm_hook=bf16"),
    ("zero1",),
    ("zero2",),
    ("fsdp",),
    ("fsdp", "strategy.cpu_offload=true"),
    ("fsdp", "train.activation_checkpointing=full", "train.offload_activations=true"),
    ("hsdp", "strategy.dp_replicate=1"),
    ("tp",),
    ("pp",),
    ("cp",),
    ("cp", "strategy.cp_method=ring"),
    ("cp", "strategy.cp_method=ulysses"),
    ("3d", "strategy.pp=1", "strategy.tp=1"),
)
MOE = ("model=moe_tiny", "model.balance=bias")


def rows(size: int, strategies: tuple[tuple[str, ...], ...], options: tuple[str, ...]) -> list[Row]:
    return [Row(size, (f"strategy={name}", *more), options) for name, *more in strategies]


ALONE = [
    *rows(1, DEGREE_ONE, (F32,)),
    *rows(1, tuple(s for s in DEGREE_ONE if "strategy.comm_hook=bf16" not in s), (BF16, COMPILED)),
    *rows(1, (("fsdp",), ("tp",), ("pp",)), (F32, COMPILED)),
    *rows(1, (("tp", "strategy.async_tp=true"),), (BF16, COMPILED)),
    *rows(1, (("ep",),), (F64, *MOE)),
]
SHARED = [
    *rows(
        2,
        (
            ("dp",),
            ("zero1",),
            ("zero2",),
            ("fsdp",),
            ("tp",),
            ("tp", "strategy.sequence_parallel=false"),
            ("tp", "strategy.loss_parallel=false"),
            ("cp",),
            ("cp", "strategy.cp_method=ulysses"),
        ),
        (F32,),
    ),
    *rows(2, (("ep",),), (F64, *MOE)),
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run_rows(tmp_path_factory.mktemp("alone"), ALONE, "nccl")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return run_rows(tmp_path_factory.mktemp("shared"), SHARED, "gloo")


@pytest.mark.parametrize("row", ALONE, ids=lambda row: row.name)
def test_degree_one_under_nccl(row, alone):
    assert_green(alone[row.name])


@pytest.mark.parametrize("row", SHARED, ids=lambda row: row.name)
def test_two_ranks_on_one_gpu(row, shared):
    assert_green(shared[row.name])
