"""The keys under `hardware`: the published figures of a device."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from train.config.fields import MAX_FIGURE, key, number


@dataclass
class HardwareConfig:
    """Metrics that need one of these figures are logged only if it is known."""

    name: str = key(
        MISSING, "The device's name here; with auto its figures are found by the name that the driver reports."
    )
    match: str | None = key(
        None, "The end of the device's name as the driver reports it; hardware=auto searches for it."
    )
    peak_tflops: dict[str, float] = key(
        dict, "The peak of dense matrix products by precision, in TFLOP/s, as {bf16: 989.0}; MFU is a share of it."
    )
    memory_gib: float | None = number(
        None, "The device's memory in GiB, as the driver reports it.", gt=0, le=MAX_FIGURE
    )
    memory_gb_per_s: float | None = number(
        None, "The bandwidth of the device's memory in GB/s; it is recorded with the run.", gt=0, le=MAX_FIGURE
    )
    link_gb_per_s: float | None = number(
        None,
        "The bandwidth of all NVLink links of a device in one direction, in GB/s; it is recorded with the run.",
        gt=0,
        le=MAX_FIGURE,
    )
    price_usd_per_hour: float | None = number(
        None,
        "The price of one device in US dollars per hour, from which the cost of tokens is logged.",
        ge=0,
        le=MAX_FIGURE,
    )
    grid_gco2_per_kwh: float | None = number(
        None,
        "The carbon intensity of the electricity, in grams of CO2 per kWh; the emissions of tokens follow from it.",
        ge=0,
        le=MAX_FIGURE,
    )
    source: dict[str, str] = key(dict, "The source of each figure.")
