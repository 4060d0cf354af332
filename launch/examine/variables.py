"""Environment variables that another launch, a cluster's image or an experiment left behind, and what each would do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from launch.examine.finding import Finding, error, ok, warning
from launch.start.environment import left_behind
from train.config.world import PLACE, environment_problem

SUBJECT = "environment"
PREFIXES = ("NCCL_", "GLOO_", "TORCH_NCCL_", "TORCH_DISTRIBUTED_", "HYDRA_", "UCX_")
SLOW = {
    "CUDA_LAUNCH_BLOCKING": "waits for the GPU after every kernel",
    "NCCL_DEBUG": "makes NCCL write many lines",
    "NCCL_IB_DISABLE": "sends over sockets instead of InfiniBand",
    "NCCL_P2P_DISABLE": "sends between GPUs through the memory of the host",
    "NCCL_SHM_DISABLE": "sends between GPUs over sockets where they have no direct way",
    "TORCH_DISTRIBUTED_DEBUG": "compares the shapes of all ranks before each collective if it is DETAIL",
}
HARMLESS = ("", "0", "OFF", "WARN", "VERSION")  # values with which a variable of SLOW does nothing
LONGEST = 40  # characters of a value that are shown


def judge(env: Mapping[str, str], interfaces: Iterable[str]) -> list[Finding]:
    """`interfaces`: the names of this machine's network interfaces."""
    names = [*interfaces]
    found = [*_launches(env), *_interfaces(env, names), *_slow(env)]
    told = {name for one in found for name in one.values.get("variables", ())}
    told |= {name for name in SLOW if env.get(name, "").upper() in HARMLESS}
    rest = sorted(name for name, value in env.items() if name.startswith(PREFIXES) and value and name not in told)
    if rest:
        message, fix = (
            f"set, and taken by every run: {_shown(env, rest)}",
            f"unset {' '.join(rest)}, unless you need them",
        )
        found.append(warning(SUBJECT, message, fix, variables=rest))
    return found or [ok(SUBJECT, "no variable is left that changes a run")]


def _launches(env: Mapping[str, str]) -> list[Finding]:
    """Variables of another launch, which launch.local ignores. A start of train/main.py takes them, or is refused."""
    found, left = [], left_behind(env)
    if problem := environment_problem(env):
        message = f"{problem.message}: launch.local ignores this, but a start of train/main.py is refused"
        found.append(error(SUBJECT, message, problem.fix, variables=[name for name in left if name in PLACE]))
        left = [name for name in left if name not in PLACE]
    if left:
        message = f"left from another launch: {_shown(env, left)}; launch.local ignores them, other starts do not"
        found.append(warning(SUBJECT, message, f"unset {' '.join(left)}", variables=left))
    return found


def _interfaces(env: Mapping[str, str], names: list[str]) -> list[Finding]:
    """Interfaces that a backend is told to use and that do not exist."""
    found = []
    asked = env.get("GLOO_SOCKET_IFNAME", "")
    if missing := [name for name in asked.split(",") if name and name not in names]:
        message = f"GLOO_SOCKET_IFNAME={asked}, but this machine has no interface {', '.join(missing)}"
        fix = f"unset GLOO_SOCKET_IFNAME, or use {' or '.join(names)}"
        found.append(error(SUBJECT, message, fix, variables=["GLOO_SOCKET_IFNAME"]))
    asked = env.get("NCCL_SOCKET_IFNAME", "")
    if asked and not any(_nccl_takes(asked, name) for name in names):
        message = f"NCCL_SOCKET_IFNAME={asked} leaves none of the interfaces {', '.join(names)}, so NCCL does not start"
        found.append(warning(SUBJECT, message, "unset NCCL_SOCKET_IFNAME", variables=["NCCL_SOCKET_IFNAME"]))
    return found


def _nccl_takes(asked: str, name: str) -> bool:
    """Whether NCCL's list takes the interface: prefixes, whole names after =, and all but the listed ones after ^."""
    others = asked.startswith("^")
    text = asked.removeprefix("^")
    whole = text.startswith("=")
    listed = [one for one in text.removeprefix("=").split(",") if one]
    return any(name == one if whole else name.startswith(one) for one in listed) != others


def _slow(env: Mapping[str, str]) -> list[Finding]:
    found = []
    for name, what in SLOW.items():
        value = env.get(name, "")
        if value.upper() not in HARMLESS:
            message = f"{_shown(env, [name])} {what}, so measured speeds are not the machine's"
            found.append(warning(SUBJECT, message, f"unset {name}", variables=[name]))
    return found


def _shown(env: Mapping[str, str], names: Iterable[str]) -> str:
    values = {name: env[name] for name in names}
    return ", ".join(f"{name}={value[:LONGEST]}{'…' if len(value) > LONGEST else ''}" for name, value in values.items())
