"""The keys under `hardware`: the published figures of a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from train.config.fields import MAX_FIGURE, MAX_RANKS, MAX_WIDTH, key, number


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
    matmul_tflops: dict[str, float] = key(
        dict,
        "The highest rate of matrix products that was measured, by precision, in TFLOP/s, as {bf16: 794.5}; no "
        "prediction of the planner exceeds it.",
    )
    processors: int | None = number(
        None, "The number of the device's streaming multiprocessors, for the planner.", ge=1, le=MAX_WIDTH
    )
    exp_tera_per_s: float | None = number(
        None,
        "How many exponentials the device computes per second, in 10^12; attention needs one per score.",
        gt=0,
        le=MAX_FIGURE,
    )
    watts: float | None = number(None, "The highest power of a device, in watts.", gt=0, le=MAX_FIGURE)
    devices_per_node: int | None = number(None, "The number of devices in a node.", ge=1, le=MAX_RANKS)
    linked_devices: int | None = number(
        None, "The number of devices that the links join; null means those of a node.", ge=1, le=MAX_RANKS
    )
    node_gb_per_s: float | None = number(
        None, "The bandwidth of a node's network in one direction, in GB/s.", gt=0, le=MAX_FIGURE
    )
    link_latency_us: float | None = number(
        None, "The latency of one step of a collective over the links, in microseconds.", ge=0, le=MAX_FIGURE
    )
    node_latency_us: float | None = number(
        None, "The latency of one step of a collective between nodes, in microseconds.", ge=0, le=MAX_FIGURE
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
    measured: dict[str, Any] = key(
        dict,
        "The tables of a measured profile, for the planner; scripts/matmul.py writes them, and docs/hardware.md explains "
        "them.",
    )
    source: dict[str, str] = key(dict, "The source of each figure.")
