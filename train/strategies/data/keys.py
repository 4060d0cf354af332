"""The keys of DDP and of FSDP2 under `strategy`."""

from __future__ import annotations

from dataclasses import dataclass

from train.config.fields import MAX_BUCKET_MB, MAX_STEPS, MAX_WIDTH, key, number
from train.config.strategy import Lossy, Strategy

# The bound of a hook's errors in the proof. PowerSGD has none for one step, because later steps correct its errors.
COMM_HOOKS = {"none": None, "fp16": 2e-3, "bf16": 2e-2, "powersgd": None}


@dataclass
class DdpKeys(Strategy):
    dp_replicate: int | None = key(
        None,
        "The degree of replication: ranks, or with dp_shard groups of ranks, that hold the same parameters and read "
        "different rows.",
    )
    bucket_mb: float = number(25.0, "The size of a bucket of gradients, reduced at once, MiB.", gt=0, le=MAX_BUCKET_MB)
    comm_hook: str = key(
        "none",
        "How gradients are compressed before they are sent; fp16, bf16 and powersgd lose digits.",
        choices=tuple(COMM_HOOKS),
    )
    powersgd_rank: int = number(
        4, "The rank of the two factors as which PowerSGD sends a matrix's gradient.", ge=1, le=MAX_WIDTH
    )
    powersgd_start_step: int = number(5, "The step at which PowerSGD begins to compress.", ge=2, le=MAX_STEPS)

    def uses_ddp(self) -> bool:
        return self.names("dp_replicate") and not self.names("dp_shard")

    def keeps_errors(self) -> bool:
        return self.comm_hook == "powersgd" and self.uses_ddp()

    def lossy(self) -> Lossy | None:
        hook = self.comm_hook
        if hook == "none" or hook not in COMM_HOOKS or not self.uses_ddp():  # rules refuse one that cannot act
            return None
        return Lossy(f"strategy.comm_hook={hook}", COMM_HOOKS[hook])


@dataclass
class FsdpKeys(Strategy):
    dp_shard: int | None = key(
        None, "The degree of sharding: ranks over which FSDP2 shards parameters, gradients and optimiser state."
    )
    zero_stage: int = number(
        3,
        "ZeRO's stage within a step: 1 keeps optimiser state sharded, 2 gradients too, 3 parameters too.",
        ge=1,
        lt=4,
    )
    reshard_after_forward: bool = key(
        True, "Whether a block's gathered parameters are freed after its forward and gathered again for its backward."
    )
    cpu_offload: bool = key(
        False, "Whether parameters, gradients and optimiser state wait in the host's memory while they are not used."
    )

    def uses_fsdp(self) -> bool:
        """Whether FSDP runs: over dp_shard, or over cp alone, which DDP uses if dp_replicate is named."""
        return self.names("dp_shard") or (self.names("cp") and not self.names("dp_replicate"))

    def frees_parameters(self) -> bool:
        return self.uses_fsdp() and self.zero_stage == 3 and self.reshard_after_forward

    def reduces_once(self) -> bool:
        return self.uses_fsdp() and self.zero_stage == 1
