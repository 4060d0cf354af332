"""Stand-ins for what a technique changes."""

from types import SimpleNamespace
from typing import Any

from train.config.schema import Config


def target(model: Any, config: Config, device_type: str = "cpu") -> Any:
    """A `Target` of a technique that reads no more than the model, the config and the device's type."""
    return SimpleNamespace(model=model, config=config, mesh=SimpleNamespace(device_type=device_type))
