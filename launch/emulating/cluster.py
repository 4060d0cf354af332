"""What an emulated cluster is: its hosts, their addresses and links, and the commands that make and shape them.

Each host is a network namespace with one interface, eth0. Its other end is a port of a bridge, which is in a namespace
of its own. A link is shaped in both directions: the host's eth0 by what it sends, the port by what it gets. What
processes of one host send to each other passes its loopback.
"""

from __future__ import annotations

from dataclasses import dataclass

from train.command.launching.network import shown_rate

NIC, BRIDGE, PORT = "eth0", "br0", "port"
NET = "10.77.0"
FIRST = 101  # the last number of the first host's address
STORE_PORT = 29400
PAYLOAD = 1448 / 1514  # of a full Ethernet frame, what TCP carries with time stamps
LO_PAYLOAD = 65483 / 65549  # of a full packet of the loopback
# A shaper lets this many seconds' worth of bytes through at once: as few as the kernel's timer allows. A queue of some
# megabytes drops nothing of what TCP has under way.
BURST_S, LEAST_BURST, QUEUE = 0.001, 16 * 2**10, 8 * 2**20
LO_BURST = 2**17  # a packet of the loopback has 64 KiB
RESULTS = "netlab.json"  # what launch.netlab writes about a cluster and its runs
SWITCH = -1  # the namespace of the bridge, where a host's number is asked for


@dataclass(frozen=True)
class Cluster:
    """`nproc` processes on `nodes` hosts, equally many on each. `intra`: the rate of each loopback in bit/s, None for
    unshaped. `delay_ms`, `loss_pct`: of packets between hosts. `slow`: rates at which single hosts send."""

    nodes: int
    nproc: int
    intra: float | None = None
    delay_ms: float | None = None
    loss_pct: float | None = None
    slow: tuple[tuple[int, float], ...] = ()

    @property
    def per_node(self) -> int:
        return self.nproc // self.nodes

    def address(self, node: int) -> str:
        return f"{NET}.{FIRST + node}"

    def makes(self) -> list[tuple[int, list[str]]]:
        """(namespace, its commands), in order, which make the bridge and the links. `{0}` stands for the id of the
        process that holds host 0."""
        steps = [(SWITCH, ["ip link set lo up", f"ip link add {BRIDGE} type bridge", f"ip link set {BRIDGE} up"])]
        for node in range(self.nodes):
            veth = f"ip link add {PORT}{node} type veth peer name {NIC} netns {{{node}}}"
            steps[0][1].extend([veth, f"ip link set {PORT}{node} master {BRIDGE} up"])
        for node in range(self.nodes):
            steps.append((node, ["ip link set lo up", f"ip addr add {self.address(node)}/24 dev {NIC}"]))
            steps[-1][1].append(f"ip link set {NIC} addrgenmode none up")
        return steps

    def shapes(self, inter: float | None) -> list[tuple[int, list[str]]]:
        """(namespace, its commands) which shape every link to `inter` bit/s, and the loopbacks; None for no shaping."""
        slow = dict(self.slow)
        down = [line for node in range(self.nodes) for line in self._link(f"{PORT}{node}", inter, netem=False)]
        found = [(SWITCH, down)] if down else []
        for node in range(self.nodes):
            lines = self._link(NIC, slow.get(node, inter), netem=True)
            if self.intra is not None:
                lines.append(f"tc qdisc replace dev lo root {_tbf(self.intra, LO_BURST)}")
            found += [(node, lines)] if lines else []
        return found

    def _link(self, device: str, rate: float | None, *, netem: bool) -> list[str]:
        """The shaper of one end of a link; delay and loss come on the way from the host to the bridge only."""
        emulated = [f"delay {self.delay_ms:g}ms"] if self.delay_ms and netem else []
        emulated += [f"loss {self.loss_pct:g}%"] if self.loss_pct and netem else []
        queue = f"netem limit 100000 {' '.join(emulated)}"
        if rate is None:
            return [f"tc qdisc replace dev {device} root handle 1: {queue}"] if emulated else []
        lines = [f"tc qdisc replace dev {device} root handle 1: {_tbf(rate, LEAST_BURST)}"]
        return [*lines, *([f"tc qdisc replace dev {device} parent 1:1 handle 10: {queue}"] if emulated else [])]

    def unshapes(self) -> list[tuple[int, list[str]]]:
        """(namespace, its commands) which remove what `shapes` has made."""
        ports = [f"tc qdisc del dev {PORT}{node} root 2>/dev/null || true" for node in range(self.nodes)]
        both = [f"tc qdisc del dev {device} root 2>/dev/null || true" for device in (NIC, "lo")]
        return [(SWITCH, ports), *((node, both) for node in range(self.nodes))]


def _tbf(rate: float, least: int) -> str:
    burst = max(least, int(rate / 8 * BURST_S))
    return f"tbf rate {shown_rate(rate)} burst {burst} limit {QUEUE}"


def cut(node: int, *, up: bool = False) -> tuple[int, list[str]]:
    """The command that takes the link of a host down, or up again."""
    return SWITCH, [f"ip link set {PORT}{node} {'up' if up else 'down'}"]
