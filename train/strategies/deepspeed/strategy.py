"""DeepSpeed's engines on the same model: its ZeRO stages (Rajbhandari et al. 2020) and its pipeline.

    each rank holds     parameters   gradients   optimiser state      sent per step, n ranks, P parameters
    stage 1             all          all         1/n                  reduction + all-gather: 2P
    stage 2             all          1/n         1/n                  the same, reduced during the backward: 2P
    stage 3             1/n          1/n         1/n                  per microbatch two all-gathers, one reduction: 3P

`pp`, without ZeRO or with stage 1, is DeepSpeed's `PipelineModule` with 1F1B. `tp`, with every stage, is its AutoTP.
docs/deepspeed.md says where gradients are scaled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from train.config.fields import MAX_BUCKET_MB, MAX_INT64, key, number
from train.config.strategy import Order, Strategy, TrainStep
from train.strategies.pipeline.placement import layers_of_stages
from train.strategies.pipeline.timetable import actions_by_rank, closed_form_bubble

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from train.config.schema import Config, ModelConfig
    from train.model.transformer import Transformer

SCHEDULE = "1f1b"  # the schedule of DeepSpeed's pipeline


@dataclass
class DeepSpeed(Strategy):
    extra: ClassVar[str | None] = "deepspeed"
    zero_stage: int = number(1, "DeepSpeed's ZeRO stage, 0 to 3; 0 is plain replication, with pp only.", ge=0, lt=4)
    pp: int | None = key(None, "The degree of DeepSpeed's pipeline.")
    dp_replicate: int | None = key(None, "The number of data ranks of stage 0.")
    dp_shard: int | None = key(None, "The number of data ranks of stages 1 to 3.")
    tp: int | None = key(None, "The degree of AutoTP, which splits blocks over heads and feed-forward columns.")
    offload_optimizer: bool = key(
        False, "Whether optimiser state and update are on the host (ZeRO-Offload, Ren et al. 2021)."
    )
    bucket_mb: float = number(
        25.0,
        "The size of gradients reduced, and of parameters gathered, at once, MiB.",
        gt=0,
        le=MAX_BUCKET_MB,
    )
    whole_below: int = number(0, "Stage 3 does not shard parameters with fewer elements than this.", ge=0, le=MAX_INT64)

    def schedule_name(self) -> str | None:
        return SCHEDULE if self.pp is not None else None

    def layers_of(self, model: ModelConfig, seq_len: int, num_ranks: int) -> list[range]:
        """The layers of every stage. DeepSpeed spreads the blocks evenly; the first stages get one more if the number
        does not divide."""
        base, extra = divmod(model.num_layers, num_ranks)
        return layers_of_stages([base + (stage < extra) for stage in range(num_ranks)])

    def order(self, num_ranks: int, num_microbatches: int) -> Order | None:
        if self.pp is None:
            return None
        shape = (SCHEDULE, num_ranks, num_ranks, num_microbatches)
        return Order(actions_by_rank(*shape), num_ranks, closed_form_bubble(*shape))

    def build(self, model: Transformer, mesh: DeviceMesh, config: Config) -> TrainStep:
        if self.pp is not None:
            from train.strategies.deepspeed.pipe import PipeStep

            return PipeStep(model, mesh, config)
        if self.tp is not None:
            from train.strategies.deepspeed.autotp import AutoTpStep

            return AutoTpStep(model, mesh, config)
        from train.strategies.deepspeed.engine import ZeroStep

        return ZeroStep(model, mesh, config)
