"""Loads the package DeepSpeed, and makes its configuration from the lab's."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from train.config.plan import Plan
from train.config.schema import Config
from train.strategies.deepspeed.strategy import DeepSpeed

ALIGNMENT = 256  # elements; DeepSpeed needs an even number of them
BYTES_PER_ELEMENT = 4  # DeepSpeed counts buckets in elements; weights and gradients are float32


def load_deepspeed(device: torch.device) -> Any:
    """The package, for this rank's device and the open process group. It compiles nothing.

    Its autotuner, which the lab does not use, imports mlflow where that is installed: three quarters of the time of the
    import, on every rank. While `mlflow` is None in `sys.modules`, importing it fails, which the autotuner expects.
    DeepSpeed would compile an op for all-reduces in shared memory on a CPU, which only inference uses. A private table
    (deepspeed 0.19) marks this op as not available.
    """
    os.environ["DS_ACCELERATOR"] = device.type  # read at import; without it DeepSpeed uses any GPU that it sees
    os.environ["LOCAL_RANK"] = str(device.index or 0)  # the device that it uses, also if ranks share one
    with _without_mlflow():
        import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # torch 2.13 renamed collectives that DeepSpeed calls by their old names
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    deepspeed.ops.__compatible_ops__ = {"deepspeed_not_implemented": False}  # instead of probing for compilers
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    return deepspeed


@contextmanager
def _without_mlflow() -> Iterator[None]:
    """Where mlflow is not loaded yet, importing it raises ImportError inside."""
    if "mlflow" in sys.modules:
        yield
        return
    sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["mlflow"]


def engine_config(config: Config, num_microbatches: int) -> dict[str, Any]:
    """DeepSpeed's own configuration. Options that are not given here have their default or are off."""
    strategy = Plan(config, 1).keys(DeepSpeed)
    bucket = int(strategy.bucket_mb * 2**20) // BYTES_PER_ELEMENT
    bucket = -(-max(bucket, 1) // ALIGNMENT) * ALIGNMENT
    zero: dict[str, Any] = {
        "stage": strategy.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "stage3_prefetch_bucket_size": bucket,
        "stage3_param_persistence_threshold": strategy.whole_below,
    }
    if strategy.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": num_microbatches,
        "gradient_clipping": config.train.clip_norm,
        "steps_per_print": None,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # it allows only Adam by name, but SGD is elementwise too
        "zero_force_ds_cpu_optimizer": False,  # its own Adam for the host would have to be compiled
    }
