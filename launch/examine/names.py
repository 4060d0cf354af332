"""The address of this machine's name, and whether processes on this machine can connect to each other.

A child process looks names up, as a look-up may take minutes and cannot be interrupted.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping

from launch.examine.child import Answers, begin, say
from launch.examine.finding import Finding, error, ok, warning

SUBJECT = "host name"
LOCAL = "127.0.0.1"
CONNECT_S = 2.0


def main() -> None:
    for name in begin():
        try:
            found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
            say(**{name: str(found[0][4][0])})
        except (OSError, UnicodeError) as why:  # the latter for a text that cannot be a name
            say(**{name: None, f"{name}: why": getattr(why, "strerror", None) or str(why)})


def judge(answers: Answers, own: str, env: Mapping[str, str]) -> list[Finding]:
    """`own`: this machine's name. MASTER_ADDR of `env`, if it is there, must have an address too."""
    found = []
    address = answers.found.get(own)
    if address:
        found.append(ok(SUBJECT, f"{own} has the address {address}", name=own, address=address))
    else:
        message = f"{own}, this machine's name, has no address ({_why(answers, own)}): launch.local needs none, but "
        message += "plain torchrun waits minutes for it"
        fix = f"add --local_addr={LOCAL} to torchrun, or the line '{LOCAL} {own}' to /etc/hosts"
        found.append(warning(SUBJECT, message, fix, name=own, address=None))
    master = env.get("MASTER_ADDR")
    if master and not answers.found.get(master):
        message = f"MASTER_ADDR={master} has no address ({_why(answers, master)}): ranks that use it wait, then fail"
        found.append(warning(SUBJECT, message, "unset MASTER_ADDR, or correct it", name=master, address=None))
    return found


def _why(answers: Answers, name: str) -> str:
    return str(answers.found.get(f"{name}: why") or answers.end)


def connection(address: str = LOCAL) -> list[Finding]:
    """Whether a process can listen on `address` and another one can connect to it."""
    try:
        with socket.create_server((address, 0)) as server:
            server.settimeout(CONNECT_S)
            with socket.create_connection(server.getsockname()[:2], CONNECT_S):
                server.accept()[0].close()
    except OSError as why:
        message = f"a process cannot connect to {address} ({why.strerror or why}), so ranks cannot find each other"
        fix = "bring the loopback interface up (ip link set lo up), or allow local connections in the firewall"
        return [error("connections", message, fix)]
    return [ok("connections", f"processes on this machine can connect to {address}")]


if __name__ == "__main__":
    main()
