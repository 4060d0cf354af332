"""The roll of an elastic run: who is in the next generation, what places are told, and how a rank is interrupted. Torch
is not used."""

import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from train.ranks.elastic.member import Member, RollLost
from train.ranks.elastic.messages import Failed, Finished, Over, Ready, Start, Waiting, decoded, encoded
from train.ranks.elastic.roll import Roll
from train.ranks.elastic.server import RollServer
from train.ranks.elastic.sockets import Connections

REPO = Path(__file__).resolve().parent.parent
WAIT_S = 20


def begun(size, step=None):
    """A roll whose places have all begun to train."""
    roll, mail = Roll(size), None
    for place in range(size):
        assert not mail, "a generation began before all places were ready"
        mail = roll.is_ready(place, step)
    assert mail == [(place, Start(1, [*range(size)], [step] * size)) for place in range(size)]
    return roll


def test_the_survivors_go_on_and_the_one_with_the_newest_step_comes_first():
    roll = begun(4)
    assert roll.has_ended(1) == [(place, Over(1, [1])) for place in (0, 2, 3)]
    assert roll.is_ready(0, 6) == roll.is_ready(3, 6) == []
    start = Start(2, [2, 0, 3], [7, 6, 6])
    assert roll.is_ready(2, 7) == [(2, start), (0, start), (3, start)]


def test_one_that_is_lost_while_the_others_get_ready_is_not_waited_for():
    roll = begun(3)
    roll.has_ended(0)
    assert roll.is_ready(1, 4) == []
    assert roll.has_ended(2) == [(1, Over(1, [0, 2])), (1, Start(2, [1], [4]))]


def test_a_place_that_is_back_waits_until_the_others_let_it_in():
    roll = begun(3)
    roll.has_ended(0)
    roll.is_ready(1, 4), roll.is_ready(2, 4)
    assert roll.is_ready(0, None) == [(1, Waiting([0])), (2, Waiting([0]))]
    assert roll.is_ready(1, 10) == []
    start = Start(3, [1, 2, 0], [10, 10, None])
    assert roll.is_ready(2, 10) == [(1, start), (2, start), (0, start)]


def test_a_place_that_is_back_joins_at_once_if_another_one_is_lost():
    roll = begun(3)
    roll.has_ended(0)
    roll.is_ready(1, 4), roll.is_ready(2, 4), roll.is_ready(0, None)
    roll.has_ended(2)
    start = Start(3, [1, 0], [5, None])
    assert roll.is_ready(1, 5) == [(1, start), (0, start)]


def test_without_any_state_all_places_must_be_there():
    roll = begun(2)
    roll.has_ended(0), roll.has_ended(1)
    assert roll.is_ready(1, None) == []
    start = Start(2, [0, 1], [None, None])
    assert roll.is_ready(0, None) == [(0, start), (1, start)]


def test_a_run_that_is_complete_lets_nobody_in():
    roll = begun(3)
    roll.has_ended(2)
    roll.is_ready(0, 9), roll.is_ready(1, 9), roll.is_ready(2, None)
    assert roll.is_done(0) == [(2, Finished())]
    assert roll.is_ready(2, None) == [(2, Finished())]
    assert roll.has_ended(0) == [], "it has finished"
    roll.has_ended(1)


def test_one_that_has_to_write_the_end_again_does_not_wait_for_those_that_are_done():
    roll = begun(3)
    roll.is_done(1)
    assert roll.has_ended(0) == [(2, Over(1, [0]))]
    assert roll.is_ready(2, 9) == [(2, Start(2, [2], [9]))]


def test_an_error_of_a_rank_ends_the_run():
    roll = begun(3)
    assert roll.has_failed(0) == [(1, Failed(0)), (2, Failed(0))]
    assert roll.has_ended(0) == [(1, Over(1, [0])), (2, Over(1, [0]))], "what they wait for is interrupted"
    assert roll.is_ready(1, 3) == roll.is_ready(2, 3) == []


def replicas(step=6):
    """The roll of two replicas of two places each, which have all made this step."""
    roll = Roll(4, unit=2)
    for place in range(4):
        roll.is_ready(place, None)
    assert roll.members == (0, 1, 2, 3)
    return roll


def test_a_replica_is_lost_as_a_whole_and_comes_back_as_a_whole():
    roll = replicas()
    assert roll.has_ended(2) == [(place, Over(1, [2])) for place in (0, 1, 3)]
    assert roll.is_ready(3, 7) == roll.is_ready(1, 7) == []
    start = Start(2, [0, 1], [6, 7])  # place 0 can make step 7, as it has entered the vote
    assert roll.is_ready(0, 6) == [(0, start), (1, start)] and start.newest() == 7
    assert roll.is_ready(2, None) == [(0, Waiting([2, 3])), (1, Waiting([2, 3]))]
    assert roll.is_ready(0, 20) == []
    start = Start(3, [0, 1, 2, 3], [20, 20, None, None])  # what place 3 has is too old
    assert roll.is_ready(1, 20) == [(place, start) for place in range(4)]


def test_nobody_is_let_in_before_a_replica_is_whole():
    roll = replicas()
    roll.has_ended(2), roll.has_ended(3)
    roll.is_ready(0, 6), roll.is_ready(1, 6)
    assert roll.is_ready(3, None) == [] and roll.is_ready(2, None) == [(0, Waiting([2, 3])), (1, Waiting([2, 3]))]


def test_if_no_replica_is_whole_all_begin_again():
    roll = replicas()
    roll.has_ended(0), roll.has_ended(3)
    assert roll.is_ready(1, 6) == roll.is_ready(2, 7) == roll.is_ready(0, None) == []
    start = Start(2, [0, 1, 2, 3], [None] * 4)
    assert roll.is_ready(3, None) == [(place, start) for place in range(4)]


def test_the_replica_with_the_newest_step_comes_first():
    roll = replicas()
    roll.is_ready(0, 6), roll.is_ready(1, 6), roll.is_ready(2, 6)
    assert roll.is_ready(3, 7)[0] == (2, Start(2, [2, 3, 0, 1], [6, 7, 6, 6]))


def test_one_of_a_broken_replica_ends_when_the_run_is_complete():
    roll = replicas()
    roll.is_done(0), roll.is_done(2), roll.is_done(3)
    assert roll.has_ended(1) == []
    roll = replicas()
    roll.is_done(0), roll.has_ended(1), roll.is_done(2)
    assert roll.is_ready(3, 9) == [(3, Finished())], "place 2 does not come back, and nothing is left to be done"


@pytest.mark.parametrize(
    "line", [b"", b"{}", b"[]", b"null", b'{"kind": "Ready"}', b'{"kind": "Exec"}', b"\xff", b"[" * 2**16]
)
def test_a_line_that_is_no_message_is_refused(line):
    with pytest.raises(ValueError):
        decoded(line)


def test_messages_arrive_as_they_are():
    for message in (Ready(3, None), Start(2, [1, 0], [4, None]), Over(1, [2]), Waiting([2]), Finished()):
        assert decoded(encoded(message)) == message


@pytest.mark.timeout(60)
def test_members_hear_of_an_end_and_interrupt_what_they_wait_for():
    server = RollServer(Roll(2), "127.0.0.1")
    interrupted = threading.Event()
    with closing(Member(0, server.address, interrupted.set, WAIT_S)) as first:
        starts = []
        with closing(Member(1, server.address, lambda: None, WAIT_S)) as second:
            waiting = threading.Thread(target=lambda: starts.append(first.next_start(None)))
            waiting.start()
            starts.append(second.next_start(None))
            waiting.join(WAIT_S)
            assert starts == [Start(1, [0, 1], [None, None])] * 2
            assert not first.is_over(0)
        assert first.is_over(WAIT_S) and interrupted.wait(WAIT_S)
        assert first.next_start(5) == Start(2, [0], [5])
        assert not first.is_over(0), "the generation has just begun"
        first.done()
        with closing(Member(1, server.address, lambda: None, WAIT_S)) as late:
            assert late.next_start(None) is None, "the run is complete"
    server.wait_until_empty()


UNINTERRUPTED = """
import sys, time
from train.ranks.elastic.member import Member

member = Member(0, sys.argv[1], lambda: None, 60)
member.next_start(None)
with member.hurried(0.2):
    time.sleep(60)
"""


@pytest.mark.timeout(60)
def test_a_rank_that_cannot_be_interrupted_is_killed():
    server = RollServer(Roll(2), "127.0.0.1")
    env = os.environ | {"PYTHONPATH": str(REPO)}
    line = [sys.executable, "-c", UNINTERRUPTED, server.address]
    with subprocess.Popen(line, env=env, stderr=subprocess.PIPE, text=True) as rank:
        with closing(Member(1, server.address, lambda: None, WAIT_S)) as other:
            other.next_start(None)
        said = rank.communicate(timeout=WAIT_S)[1]
    assert rank.returncode == -signal.SIGKILL
    assert said == "rank 0 could not be interrupted for 0.2 s and is killed\n"


@pytest.mark.timeout(60)
def test_a_member_notices_that_the_roll_has_ended():
    listener = socket.create_server(("127.0.0.1", 0))
    with listener, closing(Member(0, f"127.0.0.1:{listener.getsockname()[1]}", lambda: None, WAIT_S)) as member:
        listener.accept()[0].close()
        with pytest.raises(RollLost):
            member.next_start(None)


@pytest.mark.timeout(60)
def test_only_the_connections_of_a_generation_are_shut_down():
    with ExitStack() as opened:
        listener = opened.enter_context(socket.create_server(("127.0.0.1", 0)))

        def connected():
            near = opened.enter_context(socket.create_connection(listener.getsockname()))
            return near, opened.enter_context(listener.accept()[0])

        earlier = connected()
        connections = Connections()
        own = connected()
        connections.complete()
        later = connected()
        connections.shut_down()
        assert own[0].recv(1) == own[1].recv(1) == b"", "what waits for it goes on"
        for near, far in (earlier, later, connected()):  # the listening socket still works
            near.sendall(b"x")
            assert far.recv(1) == b"x"
