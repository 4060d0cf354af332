"""Finds the keys in which the configs of runs differ. Keys that a run did not read are ignored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from train.config.rules.idle import unread
from train.config.rules.read_when import READ_WHEN
from train.record.run_files import Record
from train.strategies.techniques import TECHNIQUES

Uses = Callable[[Record], bool]  # of the strategy's own keys
STRATEGY = "strategy."
MEANT = ("metrics.warmup_steps", "metrics.profile_every")  # the keys of `metrics` that affect a figure


def _axis(name: str) -> Uses:
    return lambda keys: keys.get(name) is not None


def _ddp(keys: Record) -> bool:
    return _axis("dp_replicate")(keys) and not _axis("dp_shard")(keys)


def _fsdp(keys: Record) -> bool:
    return _axis("dp_shard")(keys) or (_axis("cp")(keys) and not _axis("dp_replicate")(keys))


DEGREES = tuple(axis for technique in TECHNIQUES for axis in technique.axes)
# option -> the axes of its technique, if that has axes: the option has an effect only if one of these axes is named
AXES = {
    field.name: technique.axes
    for technique in TECHNIQUES
    if technique.axes
    for field in fields(technique.keys)
    if field.name not in ("name", *DEGREES)
}
# options of DDP and of FSDP, which two axes decide; what else an option needs is in the techniques' `read_when`
NEEDS: dict[str, Uses] = {
    "zero_stage": _fsdp,
    "reshard_after_forward": _fsdp,
    "cpu_offload": _fsdp,
    "bucket_mb": lambda keys: _ddp(keys) or "offload_optimizer" in keys,  # DDP's, and DeepSpeed's
    "comm_hook": _ddp,
    "powersgd_rank": _ddp,
    "powersgd_start_step": _ddp,
}
METHODS = ("schedule", "cp_method", "zero_stage")  # also shown if only some of the strategies have it


def differences(configs: list[Record], *, between_strategies: bool = True) -> dict[str, list[Any]]:
    """The keys that differ between configs, with the value in each config. A value is None if the config does not have
    the key, or the run did not read it. `between_strategies`: leave out names and degrees of strategies, which are
    shown anyway."""
    names = dict.fromkeys(key for config in configs for key in config)
    idle = [unread(config, READ_WHEN, *(one.read_when for one in TECHNIQUES)) for config in configs]
    found = {}
    for key in names:
        if key.startswith("metrics.") and key not in MEANT:
            continue
        option = key.removeprefix(STRATEGY) if key.startswith(STRATEGY) else ""
        if between_strategies and option in ("name", *DEGREES):
            continue
        meaning = [key not in idle_keys and (not option or means(option, config))
                   for config, idle_keys in zip(configs, idle, strict=True)]  # fmt: skip
        values = [config.get(key) if meant else None for config, meant in zip(configs, meaning, strict=True)]
        meant_values = [value for value, meant in zip(values, meaning, strict=True) if meant]
        apart = any(value != meant_values[0] for value in meant_values)
        if apart or (option in METHODS and meant_values and len(meant_values) < len(values)):
            found[key] = values
    return found


def means(option: str, config: Record) -> bool:
    """Whether the strategy of this config has the option and uses it."""
    keys = {key.removeprefix(STRATEGY): value for key, value in config.items() if key.startswith(STRATEGY)}
    if option not in keys or option in NEEDS:
        return option in keys and NEEDS[option](keys)
    return option not in AXES or any(keys.get(axis) is not None for axis in AXES[option])
