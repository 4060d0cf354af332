"""Energy and cost of training: the energy that the devices' own counters report, and the cost at a given price.

A counter measures a whole device. If several ranks share a device, only the first of them reads the counter, so that
its energy is not added twice. The counter changes every 20 to 100 ms, so each value is a mean over the steps since the
end of warm-up, without evaluations, and is reported only when these steps have taken long enough. Without a sensor or a
price there is no value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import torch

from train.config.schema import Config
from train.measure.hardware import device_name, hardware_of
from train.ranks.side_group import SideGroup

MIN_WINDOW_MS = 1000.0  # ten updates of the slowest counter
JOULES_PER_KWH = 3.6e6


class Meter:
    """A device without a sensor: it has no readings. `note` says why, in one line."""

    def __init__(self, note: str) -> None:
        self.note = note

    def read_joules(self) -> float | None:
        return None


class NvmlMeter(Meter):
    """The energy counter of an NVIDIA board (Volta and later). It counts the energy of the whole board (GPU, memory and
    the rest) for all processes that use it, and not the energy of the host."""

    def __init__(self, nvml: Any, handle: Any, note: str) -> None:
        super().__init__(note)
        self.nvml, self.handle = nvml, handle

    def read_joules(self) -> float | None:
        """Joules since the driver was loaded, so only the difference of two readings is useful."""
        try:
            return float(self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)) / 1e3
        except self.nvml.NVMLError:
            return None


class SharedMeter(Meter):
    """The meter of a rank whose device another rank reads: it always reads 0."""

    def read_joules(self) -> float | None:
        return 0.0


def device_id(device: torch.device) -> str:
    """A unique name of the device, which does not depend on CUDA_VISIBLE_DEVICES; empty if torch gives none."""
    if device.type != "cuda":
        return ""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return "" if uuid is None else f"GPU-{uuid}"  # as NVML writes it


def open_meter(device: torch.device) -> Meter:
    """The meter of the device, or a plain `Meter` that says why there is no counter."""
    if device.type != "cuda":
        return Meter(f"none: only NVIDIA GPUs can be read (by NVML), and the run is on {device.type}")
    try:
        import pynvml
    except ImportError:
        return Meter('none: the Python module of NVML is not installed (pip install "strategy-lab[gpu]")')
    try:
        pynvml.nvmlInit()
        # by UUID, because torch numbers only the visible devices. A MIG slice of a GPU is not found, as intended: the
        # counter measures the whole board
        handle = pynvml.nvmlDeviceGetHandleByUUID(device_id(device))
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        driver = pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError as error:
        return Meter(f"none: NVML reports '{error}' for {device_name(device)}")
    return NvmlMeter(pynvml, handle, f"NVML's energy counter of the board, driver {driver}")


def first_of_each(ids: Sequence[str]) -> list[bool]:
    """For each rank, whether it is the first rank on its device. A device without a name counts as not shared."""
    return [not name or name not in ids[:rank] for rank, name in enumerate(ids)]


def costs(
    *,
    tokens_per_step: int,
    tokens_per_s: float,
    num_devices: int,
    joules_per_step: float | None,
    price_usd_per_hour: float | None,
    grid_gco2_per_kwh: float | None,
) -> dict[str, float]:
    """Values by tag, for all devices together; the price is that of one device. A value is left out if something that
    it needs is unknown."""
    values: dict[str, float] = {}
    if price_usd_per_hour is not None:
        values["cost/usd_per_million_tokens"] = price_usd_per_hour * num_devices / 3600 / tokens_per_s * 1e6
    if joules_per_step is not None:
        values["energy/joules_per_step"] = joules_per_step
        values["energy/tokens_per_joule"] = tokens_per_step / joules_per_step
        if grid_gco2_per_kwh is not None:
            kwh_per_token = joules_per_step / tokens_per_step / JOULES_PER_KWH
            values["cost/gco2_per_million_tokens"] = kwh_per_token * 1e6 * grid_gco2_per_kwh
    return values


class Energy:
    """The energy that this rank's device used in the steps after warm-up. Collective: every rank creates one."""

    def __init__(self, config: Config, device: torch.device, side_group: SideGroup) -> None:
        ids = json.loads(side_group.share(json.dumps(side_group.gather_json(device_id(device)))))
        firsts = first_of_each(ids)
        self.num_devices = sum(firsts)
        self.meter = open_meter(device) if firsts[side_group.world.rank] else SharedMeter("read by another rank")
        self.hardware = hardware_of(config, device)
        self.tokens_per_step = config.train.global_batch_size * config.train.seq_len
        self.warmup_steps = config.metrics.warmup_steps
        self.joules = self.window_ms = 0.0
        self.steps = 0
        self.resume()

    def resume(self) -> None:
        """Start counting here: energy used before this call belongs to no step."""
        self.last = self._read()

    def step_done(self, step: int, step_ms: float, *, counted: bool = True) -> float:
        """The joules since the end of warm-up that this rank reports, or NaN if unknown. Call it when the step has just
        ended on the device. `counted`: False if a recording was read since the last call, which also used energy."""
        if step < self.warmup_steps:
            return math.nan
        now = self._read()
        if step > self.warmup_steps and counted:
            self.joules += now - self.last
            self.window_ms += step_ms
            self.steps += 1
        self.last = now
        return self.joules

    def values(self, joules_by_rank: Sequence[float], tokens_per_s: float) -> dict[str, float]:
        """The values that are known so far, by tag, for all devices together."""
        joules = sum(joules_by_rank)
        measured = self.window_ms >= MIN_WINDOW_MS and math.isfinite(joules) and joules > 0
        return costs(
            tokens_per_step=self.tokens_per_step,
            tokens_per_s=tokens_per_s,
            num_devices=self.num_devices,
            joules_per_step=joules / self.steps if measured else None,
            price_usd_per_hour=self.hardware.price_usd_per_hour,
            grid_gco2_per_kwh=self.hardware.grid_gco2_per_kwh,
        )

    def _read(self) -> float:
        joules = self.meter.read_joules()
        return math.nan if joules is None else joules
