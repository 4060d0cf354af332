"""The options of launch.netlab. Torch is not imported."""

from __future__ import annotations

from typing import Any

from train.command.launching.network import Fault, Order, fault, milliseconds, orders, percent, rate, rates
from train.command.launching.nodes import NETLAB
from train.command.option import TRUE_OR_FALSE, Option, name

INTER: Option[tuple[float, ...] | None] = Option(
    "inter",
    None,
    (NETLAB,),
    "rates such as 100mbit or 1gbit",
    rates,
    example="100mbit",
    help="The rate of the link of each host, in each direction; every strategy runs at each of several rates.",
    unset="unshaped",
)
INTRA: Option[float | None] = Option(
    "intra",
    None,
    (NETLAB,),
    "a rate such as 2gbit",
    rate,
    example="2gbit",
    help="The rate of what the processes of one host send to each other, all of them together.",
    unset="unshaped",
)
DELAY: Option[float | None] = Option(
    "delay",
    None,
    (NETLAB,),
    "a time such as 1ms or 200us",
    milliseconds,
    example="1ms",
    help="What each packet between hosts is delayed by; it needs netem in the kernel.",
    unset="none",
)
LOSS: Option[float | None] = Option(
    "loss",
    None,
    (NETLAB,),
    "a share of packets such as 1%",
    percent,
    example="1%",
    help="How many of the packets between hosts are lost; it needs netem in the kernel.",
    unset="none",
)
ORDER: Option[tuple[Order, ...] | None] = Option(
    "order",
    None,
    (NETLAB,),
    "axes from inside a host outward, as tp.pp",
    orders,
    example="tp.pp",
    help="Which axes of the mesh are inside a host, and which go across; each strategy runs in each of several orders.",
    unset="tp, cp, the data axes, then pp",
)
PRESET: Option[str | None] = Option(
    "preset",
    None,
    (NETLAB,),
    "the name of a network of configs/networks.yaml",
    name,
    example="h100_ib400",
    help="A known network, whose rates are scaled to the speed of this machine, so that computation and messages "
    "have the same ratio as there; it takes the place of inter and intra.",
    unset="none",
)
FAULT: Option[Fault | None] = Option(
    "fault",
    None,
    (NETLAB,),
    "down:NODE@STEP, down:NODE:5s@STEP, kill:NODE@STEP, late:NODE:20s or slow:NODE:10mbit",
    fault,
    example="down:1@6",
    help="What happens to a host: its link goes down after a step, or for some time; it dies after a step; it starts "
    "late; it sends at another rate than it receives.",
    unset="none",
)
LINKS: Option[bool] = Option(
    "links",
    False,
    (NETLAB,),
    *TRUE_OR_FALSE,
    example="true",
    help="Only the links are measured, by messages of several sizes, and compared with what they can carry at most.",
)
OPTIONS: tuple[Option[Any], ...] = (INTER, INTRA, DELAY, LOSS, ORDER, PRESET, FAULT, LINKS)
