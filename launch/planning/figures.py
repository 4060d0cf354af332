"""The figures of a predicted layout: speed with its interval, utilisation, traffic, and what a whole training takes.

A figure whose source the hardware file lacks is left out, and the file's key is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from train.command.planning.intervals import Interval, interval_of
from train.command.planning.search.pricer import Priced
from train.config.flops import flops_per_token
from train.config.schema import Config

HOUR = 3600


@dataclass(frozen=True)
class Costs:
    """Of a whole training. None: a figure of the hardware is missing."""

    tokens: float
    days: float
    device_hours: float
    usd: float | None
    kwh: float | None


@dataclass(frozen=True)
class Figures:
    """`tokens_per_s`, `low`, `high`: of all devices together, with an 80 % interval. `sent_bytes`: in a step, of the
    rank that sends most."""

    tokens_per_s: float
    low: float
    high: float
    step_ms: float
    mfu_pct: float | None
    sent_bytes: int
    costs: Costs


def figures(priced: Priced, intervals: Mapping[str, Interval], tokens: float, price: float | None) -> Figures:
    """`tokens`: of the whole training. `price`: of a device and hour, instead of the hardware's."""
    job, time = priced.quantities.job, priced.time
    config, devices = job.plan.config, job.plan.world_size
    speed = time.tokens_per_s_per_device * devices
    low, high = interval_of(job, dict(intervals)).around(speed)
    peak = peak_of(config, job.products)
    mfu = None if peak is None else 100 * flops_of(config) * speed / (devices * peak * 1e12)
    sent = max(sum(message.bytes for message in kind.messages) for kind in priced.quantities.kinds)
    return Figures(speed, low, high, 1e3 * time.total, mfu, sent, costs_of(config, devices, tokens, speed, price))


def costs_of(config: Config, devices: int, tokens: float, speed: float, price: float | None) -> Costs:
    hours = tokens / speed / HOUR
    each = config.hardware.price_usd_per_hour if price is None else price
    watts = config.hardware.watts
    return Costs(
        tokens,
        hours / 24,
        hours * devices,
        None if each is None else hours * devices * each,
        None if watts is None else hours * devices * watts / 1e3,
    )


def flops_of(config: Config) -> float:
    return flops_per_token(config.model, config.train.seq_len)


def peak_of(config: Config, products: str) -> float | None:
    """The data sheet's peak in TFLOP/s."""
    return config.hardware.peak_tflops.get(products)


def left_out(config: Config, products: str, price: float | None) -> list[str]:
    """What is not said, and the figure that is missing for it."""
    hardware = config.hardware
    missing = []
    if hardware.memory_gib is None:
        missing.append("whether layouts fit (hardware.memory_gib)")
    if peak_of(config, products) is None:
        missing.append(f"MFU (hardware.peak_tflops.{products})")
    if hardware.price_usd_per_hour is None and price is None:
        missing.append("cost (price=, or hardware.price_usd_per_hour)")
    if hardware.watts is None:
        missing.append("energy (hardware.watts)")
    return missing
