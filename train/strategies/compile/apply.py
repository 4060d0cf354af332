"""Compiles transformer blocks and the loss, so that every strategy computes the same numbers."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.compiler import config

from train.config.schema import Precision
from train.config.technique import Target


def compile_blocks(target: Target) -> None:
    """Compile only `forward`, so that hooks that data parallelism adds later run outside, in eager Python."""
    if target.mesh.device_type != "cpu":
        wait_between_loops()
    options: dict[str, Any] = {}
    if target.config.precision is Precision.fp8:
        # A compiled kernel keeps float32 between two casts that it fuses. It would round a float32 weight to 8 bits at
        # once, but a weight that FSDP gathered in bf16 twice, and gradients would differ by up to 16 %.
        options["emulate_precision_casts"] = True
        # Each of these casts counts as an operation. On a GPU, torch stores what takes more than 30 operations and is
        # read by several others. It would be float32, which takes longer to read than to compute again. A limit above
        # 100 would also move the one that keeps torch's own recursion from becoming too deep.
        options["realize_opcount_threshold"] = 100
    for module in (*target.model.layers.values(), target.model.loss):
        module.forward = torch.compile(module.forward, options=options)


@cache
def wait_between_loops() -> None:
    """Make the threads of a kernel wait for each other after each of its loops that stores, in all kernels that are
    compiled from now on (pytorch#190517; torch 2.11 to 2.13, private).

    A kernel that inductor writes may store a tensor in one loop and load it in a later one. Triton may give an element
    to one thread in the first loop and to another in the second, which then may read what was in memory before. With
    torchao's products in 8 bits, losses of `tiny` differed by up to 2 % on H200s, and gradients were wrong.
    """
    from torch._inductor.codegen.triton import TritonKernel, TritonScheduling

    class WaitingKernel(TritonKernel):
        def codegen_body(self) -> None:
            waits = bool(self.stores) and any(tree.is_loop for tree in self.range_trees)
            super().codegen_body()
            if waits:
                self.body.writeline("tl.debug_barrier()")

    TritonScheduling.kernel_type = WaitingKernel
    # A cache on disk may have kernels that do not wait. In torch 2.13 a thread has its own value, but a backward is
    # compiled with that of its caller.
    config.cache_key_tag += "+wait_between_loops"
