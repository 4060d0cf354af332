"""How blocks are compiled: kernels wait for what they stored, and fp8 rounds every cast."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from torch._inductor.codegen.simd import IterationRangesRoot
from torch._inductor.codegen.triton import TritonKernel, TritonScheduling
from torch._inductor.utils import IndentedBuffer
from torch.compiler import config

from tests.rows.base import configured
from tests.targets import target
from train.strategies.compile.apply import compile_blocks, wait_between_loops


def body_of(kernel_type, stores: str, *, loops: bool) -> list[str]:
    """The lines of a kernel's body after one loop, or after a block without one."""
    kernel = object.__new__(kernel_type)
    kernel.body, kernel.stores = IndentedBuffer(), IndentedBuffer()
    kernel.range_trees = [SimpleNamespace(is_loop=False), SimpleNamespace(is_loop=loops)]
    kernel.stores.splice(stores)
    kernel.codegen_body()
    return kernel.body.getvalue().split()


@pytest.fixture
def waiting(monkeypatch):
    def written(kernel: TritonKernel) -> None:
        kernel.body.splice(kernel.stores)
        kernel.stores.clear()

    monkeypatch.setattr(TritonKernel, "codegen_body", written)
    monkeypatch.setattr(TritonScheduling, "kernel_type", TritonKernel)
    wait_between_loops.cache_clear()
    with config.patch(cache_key_tag="mine"):  # type: ignore[attr-defined]  # torch makes it at run time
        wait_between_loops()
        wait_between_loops()
        yield TritonScheduling.kernel_type
    wait_between_loops.cache_clear()


def test_threads_wait_after_a_loop_that_stores(waiting):
    assert body_of(waiting, "store", loops=True) == ["store", "tl.debug_barrier()"]
    assert body_of(waiting, "store", loops=False) == ["store"]
    assert body_of(waiting, "", loops=True) == []


def test_torch_still_says_which_dimensions_are_loops():
    assert "is_loop" in inspect.signature(IterationRangesRoot).parameters


def test_kernels_on_disk_that_do_not_wait_are_not_taken(waiting):
    assert config.cache_key_tag == "mine+wait_between_loops"


def test_only_fp8_rounds_every_cast_and_does_not_store_more_for_it(monkeypatch):
    given = []

    def noted(function, options):
        given.append(options)
        return function

    monkeypatch.setattr(torch, "compile", noted)
    model = SimpleNamespace(layers={}, loss=torch.nn.Identity())
    for precision in ("bf16", "fp8"):
        compile_blocks(target(model, configured(["strategy=single", f"precision={precision}", "compile.enabled=true"])))
    assert given == [{}, {"emulate_precision_casts": True, "realize_opcount_threshold": 100}]
