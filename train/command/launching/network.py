"""Rates, times and faults as words of launch.netlab have them: `100mbit`, `1ms`, `down:1@6`. Torch is not imported."""

from __future__ import annotations

import re
from dataclasses import dataclass

from train.config.strategy import MESH_AXES

UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}  # as tc has them
MOST_SPEEDS, MOST_ORDERS = 20, 24
SLOWEST, FASTEST = 1e5, 1e12  # bit/s
MOST_S = 3600.0
KINDS = ("down", "kill", "late", "slow")
Order = tuple[str, ...]


def rate(text: str) -> float | None:
    """Bits per second of `100mbit`; None if the text is not a rate."""
    found = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,3})?)(kbit|mbit|gbit)", text)
    value = float(found[1]) * UNITS[found[2]] if found else 0.0
    return value if SLOWEST <= value <= FASTEST else None


def rates(text: str) -> tuple[float, ...] | None:
    found = [rate(part) for part in text.split(",")]
    known = tuple(dict.fromkeys(value for value in found if value is not None))
    return known if len(known) == len(found) <= MOST_SPEEDS else None


def shown_rate(value: float) -> str:
    """`100mbit` for 1e8, as tc takes it."""
    unit, size = max(((unit, size) for unit, size in UNITS.items() if size <= value), key=lambda one: one[1])
    return f"{value / size:.6g}{unit}"


def milliseconds(text: str) -> float | None:
    found = re.fullmatch(r"([0-9]{1,4}(?:\.[0-9]{1,3})?)(us|ms)", text)
    value = float(found[1]) / (1 if found[2] == "ms" else 1e3) if found else 0.0
    return value if 0 < value <= 1e3 * MOST_S else None


def percent(text: str) -> float | None:
    found = re.fullmatch(r"([0-9]{1,2}(?:\.[0-9]{1,4})?)%?", text)
    value = float(found[1]) if found else 0.0
    return value if 0 < value <= 50 else None


def seconds(text: str) -> float | None:
    found = re.fullmatch(r"([0-9]{1,4}(?:\.[0-9]{1,3})?)s", text)
    value = float(found[1]) if found else 0.0
    return value if 0 < value <= MOST_S else None


def orders(text: str) -> tuple[Order, ...] | None:
    """Orders of axes, each from inside a host outward: `tp.pp,pp.tp`."""
    found = tuple(tuple(part.split(".")) for part in text.split(","))
    right = all(len({*one}) == len(one) and {*one} <= {*MESH_AXES} for one in found)
    return tuple(dict.fromkeys(found)) if right and len(found) <= MOST_ORDERS else None


@dataclass(frozen=True)
class Fault:
    """What happens to a host. `step`: after which step has been logged. `seconds`: how long the link stays down, or how
    late the host starts; None of a link: for good. `rate`: at which it sends, in bit/s."""

    kind: str
    node: int
    step: int | None = None
    seconds: float | None = None
    rate: float | None = None

    def __str__(self) -> str:
        value = f":{shown_rate(self.rate)}" if self.rate else f":{self.seconds:g}s" if self.seconds else ""
        return f"{self.kind}:{self.node}{value}" + ("" if self.step is None else f"@{self.step}")


def fault(text: str) -> Fault | None:
    """`down:1@6`, `down:1:5s@6`, `kill:1@6`, `late:1:20s` or `slow:1:10mbit`; None if the text is none of them."""
    found = re.fullmatch(r"(down|kill|late|slow):([0-9]{1,3})(?::([^@:]+))?(?:@([1-9][0-9]{0,8}))?", text)
    if not found:
        return None
    kind, node, value, step = found[1], int(found[2]), found[3], found[4] and int(found[4])
    takes = {"down": seconds, "late": seconds, "slow": rate}.get(kind)
    amount = takes(value) if takes and value else None
    if amount is None and (value or kind in ("late", "slow")):
        return None
    if (step is None) == (kind in ("down", "kill")):
        return None
    return Fault(kind, node, step or None, *((None, amount) if kind == "slow" else (amount, None)))
