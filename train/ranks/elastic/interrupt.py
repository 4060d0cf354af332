"""Ends what a rank waits for when its generation is over, and tells whether what its device computed is complete.

gloo cannot be aborted, so its connections are shut down (sockets.py). With nccl a rank does not notice that a peer has
ended: a kernel on the device waits for the peer, and the rank waits for the kernel, until another thread aborts the
group. What was queued behind an aborted kernel then runs with incomplete data, and nothing tells this. So before a rank
uses what depends on other ranks to change its state or to write it down, it must call `check`.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import ErrorType
from torch.distributed import distributed_c10d

from train.ranks.elastic.sockets import Connections

if TYPE_CHECKING:
    from train.ranks.elastic.member import Member

ABORT_S = 2.0  # the connections are shut down after this time, even if the groups are not yet aborted


class Interrupt:
    """Of a generation that begins now. The `member` calls it when the generation is over, in another thread than the
    one that trains, and again and again until that one has noticed, as it may just make another group."""

    def __init__(self, member: Member) -> None:
        self.member, self.connections = member, Connections()
        self.lock = threading.Lock()
        self.aborting: list[threading.Thread] = []

    def __call__(self) -> None:
        self.abort()
        if not self.member.failed:  # else all ranks end, and they may still read what the first one has sent
            self.connections.shut_down()

    def abort(self) -> None:
        """Abort the groups of nccl and of similar backends, which a rank can then close without waiting for others.
        Each in a thread of its own, because one may wait until the kernels of the others have ended
        (pytorch#119797)."""
        with self.lock:
            if not any(thread.is_alive() for thread in self.aborting):
                self.aborting = [threading.Thread(target=_abort, args=[group], daemon=True) for group in _on_device()]
                for thread in self.aborting:
                    thread.start()
            deadline = time.monotonic() + ABORT_S
            for thread in self.aborting:
                thread.join(max(deadline - time.monotonic(), 0))

    def check(self) -> None:
        """Wait for the device. Raises DistBackendError if groups were aborted before it had finished: by this object,
        or by torch after the time-out. With gloo alone nothing is to be checked, as its operations raise errors."""
        groups = _on_device()
        if not groups:
            return
        torch.accelerator.synchronize()
        if self.member.over.is_set():
            raise dist.DistBackendError("the groups were aborted, as a remote process exited")
        accelerator = torch.accelerator.current_accelerator()
        assert accelerator is not None
        for group in groups:
            error = group._get_backend(accelerator).get_error()
            if error != ErrorType.SUCCESS:
                what = "timed out" if error == ErrorType.TIMEOUT else "was aborted"
                raise dist.DistBackendError(f"a collective {what} ({group.group_desc}: {error.name})")


def _on_device() -> list[dist.ProcessGroup]:
    """The groups whose operations run on the device. It uses a private table of torch (2.11 to 2.13)."""
    return [group for group, (backend, _) in list(distributed_c10d._world.pg_map.items()) if backend != "gloo"]


def _abort(group: dist.ProcessGroup) -> None:
    with suppress(RuntimeError):  # it lasted longer than the time-out of the group
        group.abort()
