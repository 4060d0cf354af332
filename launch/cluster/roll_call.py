"""The roll call of launch.node: before torchrun starts, every node tells node 0 who it is and what it would run.

Node 0 listens at the head's address. Each other node connects, sends one line of JSON, and waits. When all have come,
or the time is up, all of them get the same answer: to start, or why not, with the names of those who have joined. Only
then torchrun uses the port. What arrives from the network is compared and printed, and never executed.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from launch.start.nodes import Node
from train.command.process.disagreement import disagreements
from train.config.problems import EXIT_ENVIRONMENT, EXIT_INPUT, BadInput, Problem

PROGRAM = "strategy-lab roll call 1"
MOST_BYTES = 2**20  # of a message
READ_S, RETRY_S = 5.0, 0.25
LATER_S = 5.0  # how much longer than node 0 the others wait for its answer
SHOWN = 80  # characters of a name that another node sends
FIX = "start all nodes with the same command line and the same installation"


@dataclass
class Caller:
    """Node 0. `joined`: the nodes by number, each with its name. `facts`: what they would run, by the same name."""

    node: Node
    joined: dict[int, str] = field(default_factory=dict)
    facts: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    complete: asyncio.Event = field(default_factory=asyncio.Event)
    answer: asyncio.Future[dict[str, Any]] | None = None

    def join(self, number: int, name: str, facts: Mapping[str, Any]) -> None:
        self.joined[number], self.facts[name] = name, facts
        if len(self.joined) == self.node.count:
            self.complete.set()

    def why_not(self, number: int, name: str, facts: Mapping[str, Any]) -> Problem | None:
        """The reason why a node cannot join, which does not end the roll call."""
        if number in self.joined:
            message = f"node={number} was given twice: {name} came after {self.joined[number]}"
            return _problem(message, "give every node its own number")
        if number >= self.node.count:
            fix = f"use the same nodes=N on all of them, and node=0 to node={self.node.count - 1}"
            return _problem(
                f"node {name} was started with nodes={facts.get('nodes')}, node 0 with {self.node.count}", fix
            )
        return None

    def problems(self) -> list[Problem]:
        """What is wrong when all have come or the time is up."""
        found = disagreements({name: self.facts[name] for _, name in sorted(self.joined.items())}, "nodes", FIX)
        missing = [str(number) for number in range(self.node.count) if number not in self.joined]
        if missing:
            names = ", ".join(name for _, name in sorted(self.joined.items()))
            refused = "".join(f"; not taken: {one}" for one in self.refused)
            message = (
                f"{len(self.joined)} of {self.node.count} nodes joined within join_s={self.node.join_s}: {names}; "
                f"missing: {', '.join(missing)}{refused}"
            )
            fix = f"start them with node=NUMBER and head={shown(self.node)}, or wait longer with join_s=SECONDS"
            found.insert(0, _problem(message, fix))
        return found


def roll_call(node: Node, facts: Mapping[str, Any]) -> str:
    """Wait until all nodes have joined, and return a text that is the same on all of them, and another one each time.

    `facts`: what must be equal on all nodes, by key. Raises BadInput on every node if a node is missing after
    `node.join_s`, if facts differ, or if the head is wrong.
    """
    return asyncio.run(_call(node, facts) if node.number == 0 else _answer(node, facts))


async def _call(node: Node, facts: Mapping[str, Any]) -> str:
    caller = Caller(node)
    caller.answer = asyncio.get_running_loop().create_future()
    caller.join(0, _name(0, socket.gethostname()), facts)
    guests: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        guests.add(task)
        try:
            await _receive(caller, reader, writer)
        finally:
            guests.discard(task)
            writer.close()

    server = await _listening(node, serve)
    print(f"node 0 waits for {node.count - 1} more node(s) at {shown(node)}, at most {node.join_s} s", flush=True)
    async with server:
        with suppress(TimeoutError):
            await asyncio.wait_for(caller.complete.wait(), node.join_s)
        problems = caller.problems()
        launch = uuid.uuid4().hex
        stop = [[one.message, one.fix, one.exit_code] for one in problems]
        caller.answer.set_result({"stop": stop} if stop else {"launch": launch})
        if guests:
            await asyncio.wait(guests, timeout=READ_S)
    if problems:
        raise BadInput(*problems)
    print(f"all nodes have joined: {', '.join(name for _, name in sorted(caller.joined.items()))}", flush=True)
    return launch


async def _listening(node: Node, serve: Any) -> asyncio.Server:
    """The server at the head's address. A name may get its address a moment after the machine has started."""
    deadline = time.monotonic() + node.join_s
    while True:
        try:
            return await asyncio.start_server(serve, node.head, node.port, limit=MOST_BYTES)
        except socket.gaierror as error:
            if time.monotonic() > deadline:
                raise BadInput(_no_address(node, error)) from error
            await asyncio.sleep(RETRY_S)
        except OSError as error:
            why = _said(error)
            fix = "start node=0 on the machine that has this address, with a port that is free there"
            raise BadInput(_problem(f"node 0 cannot listen at head={shown(node)} ({why})", fix)) from error


async def _receive(caller: Caller, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One guest of node 0, from its message to its answer. One that leaves meanwhile has not joined."""
    assert caller.answer is not None
    hello = await _message(reader, READ_S)
    if hello is None or hello.get("program") != PROGRAM:
        return
    number, facts = hello.get("node"), hello.get("facts")
    if not isinstance(number, int) or number < 1 or not isinstance(facts, dict):
        return
    name = _name(number, str(hello.get("host")))
    if problem := caller.why_not(number, name, facts):
        caller.refused.append(problem.message)
        await _send(writer, {"stop": [[problem.message, problem.fix, problem.exit_code]]})
        return
    caller.join(number, name, facts)
    gone = asyncio.ensure_future(reader.read(1))
    await asyncio.wait({gone, caller.answer}, return_when=asyncio.FIRST_COMPLETED)
    if not caller.answer.done():
        del caller.joined[number], caller.facts[name]
        return
    await _send(writer, caller.answer.result())
    with suppress(TimeoutError, OSError):  # the guest closes first, so that the port is free at once
        await asyncio.wait_for(gone, READ_S)


async def _answer(node: Node, facts: Mapping[str, Any]) -> str:
    """A node other than 0: join as soon as the head listens, and wait for its answer."""
    deadline, why = time.monotonic() + node.join_s, ""
    while time.monotonic() < deadline:
        try:
            reader, writer = await asyncio.wait_for(
                asyncio.open_connection(node.head, node.port, limit=MOST_BYTES),
                max(deadline - time.monotonic(), RETRY_S),
            )
        except (OSError, TimeoutError) as error:
            why = _said(error)
            await asyncio.sleep(RETRY_S)
            continue
        try:
            hello = {"program": PROGRAM, "node": node.number, "host": socket.gethostname(), "facts": facts}
            await _send(writer, hello)
            answer = await _message(reader, node.join_s + LATER_S)
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
        if answer is not None:
            return _accepted(node, answer)
        why = "it closed the connection without an answer"
        await asyncio.sleep(RETRY_S)
    fix = "start node=0 there first, or correct head; a firewall must let its port through"
    message = f"node {node.number} could not join node 0 at head={shown(node)} within join_s={node.join_s} ({why})"
    raise BadInput(_problem(message, fix))


def _accepted(node: Node, answer: Mapping[str, Any]) -> str:
    """What node 0 says: the text of the launch, or BadInput."""
    launch, stop = answer.get("launch"), answer.get("stop")
    if isinstance(launch, str):
        return launch
    if isinstance(stop, list) and stop and all(isinstance(one, list) and len(one) == 3 for one in stop):
        codes = (EXIT_INPUT, EXIT_ENVIRONMENT)
        given = ((str(said), str(fix), code if code in codes else EXIT_ENVIRONMENT) for said, fix, code in stop)
        raise BadInput(*(Problem("roll_call", said, fix, exit_code=code) for said, fix, code in given))
    fix = "use the address of node 0, and a port that no other program has there"
    raise BadInput(_problem(f"head={shown(node)} is not node 0 of launch.node, but another program", fix))


async def _send(writer: asyncio.StreamWriter, values: Mapping[str, Any]) -> None:
    with suppress(OSError):
        writer.write(json.dumps(values).encode() + b"\n")
        await writer.drain()


async def _message(reader: asyncio.StreamReader, seconds: float) -> dict[str, Any] | None:
    """One line of JSON; None if the connection ends or nothing comes. Of another program: an empty dictionary."""
    try:
        line = await asyncio.wait_for(reader.readline(), seconds)
    except (OSError, TimeoutError):
        return None
    except ValueError:  # it is too long
        return {}
    if not line:
        return None
    try:
        values = json.loads(line)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def shown(node: Node) -> str:
    return f"[{node.head}]:{node.port}" if ":" in node.head else f"{node.head}:{node.port}"


def _name(number: int, host: str) -> str:
    printable = "".join(one if one.isprintable() else "?" for one in host[:SHOWN])
    return f"{number} ({printable})"


def _no_address(node: Node, error: OSError) -> Problem:
    return _problem(f"head={shown(node)} has no address ({_said(error)})", "use the address of node 0 itself")


def _said(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "no answer"
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _problem(message: str, fix: str) -> Problem:
    return Problem("roll_call", message, fix, exit_code=EXIT_ENVIRONMENT)
