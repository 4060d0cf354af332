"""A run as the cost model sees it: a plan, and what a plan of this lab does not say."""

from __future__ import annotations

from dataclasses import dataclass

from train.command.planning.profile import lacking, profile_of
from train.config.groups.hardware import HardwareConfig
from train.config.plan import Plan
from train.strategies.pipeline.placement import SCHEDULES

# a precision without a rate of its own takes that of the next one
NEXT_PRECISION = {"nvfp4": "fp8", "fp8": "bf16", "bf16": "float32", "float32": "float64"}
LOW_PRECISION = ("fp8", "nvfp4")  # only of the layers' products; attention and the head stay in 16 bits


@dataclass(frozen=True)
class Job:
    """A plan to be priced. `plan.config.hardware` must have the figures that `missing_figures` names.

    `products`: the precision of the matrix products (`rate_of_products`). `sends_parts`: whether a pipeline sends a
    hidden state that all ranks of `tp` hold only once, in parts (Megatron's scatter/gather).
    `reduces_late`: whether gradients are reduced after the last backward and not during it. `async_tp`: whether the
    messages of `tp` run in pieces beside the products that need them. `bubble_share`: the pipeline's bubble as a share
    of that of 1f1b with the same stages. `chunks`: the stages into which each rank's layers are cut, if the plan has
    only one: a schedule of others, which does not gather parameters again as torch's do.
    """

    plan: Plan
    products: str
    async_tp: bool = False
    sends_parts: bool = False
    reduces_late: bool = False
    bubble_share: float = 1.0
    chunks: int = 1

    @property
    def stages_per_rank(self) -> int:
        return self.chunks * max(self.plan.config.strategy.num_chunks(), 1)

    def rate_of(self, precision: str) -> float:
        """The rate of matrix products in TFLOP/s."""
        rate = rate_of_products(self.plan.config.hardware, precision)
        assert rate is not None, "missing_figures names it"
        return rate


def rate_of_products(hardware: HardwareConfig, precision: str) -> float | None:
    """TFLOP/s: as it was measured; else of the data sheet's peak the same share as where both are known; else that of
    the next precision. None if nothing of this is known."""
    rates, peaks = hardware.matmul_tflops, hardware.peak_tflops
    shares = [rate / peak for name, rate in rates.items() if (peak := peaks.get(name))]
    if precision in rates:
        return rates[precision]
    if precision in peaks and shares:
        return min(shares) * peaks[precision]
    following = NEXT_PRECISION.get(precision)
    return None if following is None else rate_of_products(hardware, following)


def of_plan(plan: Plan) -> Job:
    """The job of a plan of this lab."""
    strategy = plan.config.strategy
    name = strategy.schedule_name()
    splits = name is not None and SCHEDULES[name].splits_backward
    return Job(
        plan,
        products=plan.config.precision.value,
        async_tp=bool(getattr(strategy, "async_tp", False)),
        bubble_share=1 / 3 if splits else 1.0,
    )


def missing_figures(job: Job) -> list[str]:
    """The figures that the job needs and that neither the hardware file nor its measured profile has."""
    hardware = job.plan.config.hardware
    if profile := profile_of(hardware, job.products, job.plan.config.compile.enabled):
        far = [degree for degree in job.plan.degrees.values() if degree > 1 and not profile.has_messages(degree)]
        missing = _missing_links(job) if far else []
        unknown = f"messages between {max(far, default=0)} ranks"
        return [unknown] if missing else []
    missing = [name for name in ("memory_gb_per_s", "processors", "exp_tera_per_s") if getattr(hardware, name) is None]
    missing += _missing_links(job)
    if rate_of_products(hardware, job.products) is None:
        missing.append(f"matmul_tflops.{job.products}")
    if missing and hardware.measured:  # a profile, but of another precision or stopped too early
        return [f"measured.{name}" for name in lacking(hardware, job.products)]
    return missing


def _missing_links(job: Job) -> list[str]:
    """The missing figures of the data sheet from which messages are predicted."""
    hardware, world_size = job.plan.config.hardware, job.plan.world_size
    needed = ["link_gb_per_s", "link_latency_us", "devices_per_node"] if world_size > 1 else []
    if world_size > 1 and world_size > (hardware.devices_per_node or 1):
        needed += ["node_gb_per_s", "node_latency_us"]
    return [name for name in needed if getattr(hardware, name) is None]
