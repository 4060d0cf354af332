"""The time of a GPU's kernels by kind."""

import gzip
import json

import pytest

from scripts.benching.kernels import HIDDEN, IDLE, STEP, by_kind, kind_of, last_trace, lines
from train.config.problems import BadInput

NAMES = {
    "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "messages",
    "void pytorch_flash::flash_fwd_kernel<…>(Flash_fwd_params)": "attention",
    "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT": "matrix products",
    "void at::native::multi_tensor_apply_kernel<…, FusedAdamMathFunctor<float>>": "optimiser",
    "triton_red_fused__log_softmax__to_copy_nll_loss_forward_0": "loss",
    "triton_poi_fused__to_copy_add_mul_3": "norms and elementwise",
    "Memcpy DtoD (Device -> Device)": "copies, casts and fills",
    "void at::native::_scatter_gather_elementwise_kernel<128, 4>": "sums and elementwise, eager",
}


def kernel(name, start_ms, ms):
    return {"ph": "X", "cat": "kernel", "name": name, "ts": start_ms * 1e3, "dur": ms * 1e3}


def test_kinds_of_kernels():
    assert {name: kind_of(name) for name in NAMES} == NAMES
    assert kind_of("something_else") == "other kernels"


def test_a_message_hides_behind_a_product_and_the_rest_is_a_gap():
    message, product = (next(n for n, kind in NAMES.items() if kind == one) for one in ("messages", "matrix products"))
    events = [kernel(product, 0, 10), kernel(message, 6, 8), kernel(product, 20, 5), {"cat": "cpu_op", "name": "x"}]
    times = by_kind(events)
    assert (times["matrix products"], times["messages"]) == pytest.approx((15, 8))
    assert (times[HIDDEN], times[IDLE], times[STEP]) == pytest.approx((4, 6, 25))
    table = lines({"a": times, "b": times | {"messages": 0.0}})
    assert table[0] == "| ms | a | b |" and "| messages | 8.0 | 0.0 |" in table
    assert not any("attention" in row for row in table)


def test_the_last_trace_is_read_and_what_is_none_is_said(tmp_path):
    with pytest.raises(BadInput, match="has no trace"):
        last_trace(tmp_path)
    for step in (9, 10):
        file = tmp_path / "traces" / f"step-{step}-rank-0.json.gz"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(gzip.compress(json.dumps({"traceEvents": [{"name": str(step)}]}).encode()))
    assert last_trace(tmp_path) == [{"name": "10"}]
    with pytest.raises(BadInput, match="no kernels of a GPU"):
        by_kind(last_trace(tmp_path))
    for damaged in (
        b"",
        file.read_bytes()[:20],
        gzip.compress(b"{}"),
        gzip.compress(b"[]"),
        gzip.compress(b'{"traceEvents": 1}'),
    ):
        file.write_bytes(damaged)
        with pytest.raises(BadInput, match="cannot be read"):
            last_trace(tmp_path)
