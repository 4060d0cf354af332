"""What torch sees on this machine, and an all-reduce of two ranks: a process of its own, which the doctor watches.

It imports torch, and says its version and backends. Then it forks a process that looks at the devices, and then the two
ranks. They choose their device and backend as the ranks of a run do, and find each other through a file in memory, so
no port and no disk is used. This process uses no device itself, as a forked process could not use it then.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.context import ForkProcess
from typing import TYPE_CHECKING, Any

from launch.examine.child import begin, say
from train.command.process.parent import die_with
from train.config.problems import BadInput
from train.config.world import World, quiet_profiler

if TYPE_CHECKING:  # it imports torch
    import torch

NUM_RANKS = 2
ELEMENTS = 2**20  # of float32: 4 MiB
NUM_TIMES = 5  # timed all-reduces, after one that opens the connections
COLLECTIVE_S = 15.0  # for the ranks to meet, and for an all-reduce
STAGE_S = 25.0  # for the devices, and for the ranks: more than a collective's time-out, so that its error is seen
LONGEST = 300  # characters of an error


def main() -> None:
    asked = begin()
    quiet_profiler()
    started = time.perf_counter()
    import torch
    import torch.distributed as dist

    say(torch=torch.__version__, import_s=time.perf_counter() - started, cuda=torch.version.cuda)
    say(distributed=dist.is_available())
    if not dist.is_available():
        return
    say(backends=[name for name in dist.Backend.backend_list if _available(name)])
    _run([partial(_devices, asked)], ["devices"])
    store = f"/proc/self/fd/{os.memfd_create('store')}"  # the forked ranks have it open too
    ranks = range(NUM_RANKS)
    say(ready_s=time.perf_counter() - started)
    _run([partial(_rank, rank, asked, store) for rank in ranks], [f"rank_{rank}" for rank in ranks])


def _available(backend: str) -> bool:
    import torch.distributed as dist

    return backend not in ("undefined", "fake") and dist.is_backend_available(backend)


def _run(functions: list[Callable[[], dict[str, Any]]], names: list[str]) -> None:
    """Run each function in a forked process, and say its answer or how it failed, under its name."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_answer, args=(one, name)) for one, name in zip(functions, names, strict=True)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + STAGE_S
    for process, name in zip(processes, names, strict=True):
        process.join(max(deadline - time.monotonic(), 0))
        if process.exitcode is None:
            say(**{name: {"error": f"it took longer than {STAGE_S:g} s"}})
        elif process.exitcode:
            say(**{name: {"error": _ended(process), "lost": True}})
    for process in processes:
        process.kill()
        process.join()


def _ended(process: ForkProcess) -> str:
    code = process.exitcode or 0
    return f"its process was ended by signal {-code}" if code < 0 else f"its process ended with exit code {code}"


def _answer(function: Callable[[], dict[str, Any]], name: str) -> None:
    die_with(os.getppid())
    try:
        say(**{name: function()})
    except BadInput as refused:
        problem = refused.problems[0]
        say(**{name: {"error": problem.message, "fix": problem.fix}})
    except Exception as why:
        text = str(why).strip() or "no message"
        say(**{name: {"error": f"{type(why).__name__}: {text.splitlines()[0]}"[:LONGEST]}})


def _devices(asked: dict[str, Any]) -> dict[str, Any]:
    """The accelerators with their memory, and the device and backend that a run of nproc processes would use."""
    import torch

    from train.config.schema import RuntimeConfig
    from train.ranks.distributed import choose_runtime

    accelerator, devices = torch.accelerator.current_accelerator(check_available=True), []
    if accelerator is not None:
        module = torch.get_device_module(accelerator)
        for index in range(torch.accelerator.device_count()):
            device = torch.device(accelerator.type, index)
            free, total = module.mem_get_info(device) if hasattr(module, "mem_get_info") else (None, None)
            torch.ones(2, device=device).sum().item()  # whether its kernels run at all
            name = module.get_device_name(device) if hasattr(module, "get_device_name") else accelerator.type
            devices.append({"name": name, "free": free, "total": total})
    nproc = asked["nproc"]
    world = World(0, 0, nproc, nproc, from_torchrun=True)
    runtime = choose_runtime(RuntimeConfig(**asked["runtime"]), world)
    return {"devices": devices, "device": runtime.device.type, "backend": runtime.backend, "note": runtime.note}


def _rank(rank: int, asked: dict[str, Any], store: str) -> dict[str, Any]:
    """Sum a tensor over both ranks several times. `store`: the file through which they find each other. Raises
    ArithmeticError if a sum is wrong."""
    import torch.distributed as dist

    from train.config.schema import RuntimeConfig
    from train.ranks.distributed import choose_runtime, process_group

    world = World(rank, rank, NUM_RANKS, NUM_RANKS, from_torchrun=True)
    runtime = choose_runtime(RuntimeConfig(**asked["runtime"]), world)
    started = time.perf_counter()
    with process_group(runtime, world, COLLECTIVE_S, dist.FileStore(store, NUM_RANKS)):
        times = [_all_reduce(rank, runtime.device) for _ in range(1 + NUM_TIMES)]
    return {
        "device": runtime.device.type,
        "backend": runtime.backend,
        "all_reduce_ms": statistics.median(times[1:]) * 1e3,
        "mib": ELEMENTS * 4 / 2**20,
        "s": time.perf_counter() - started,
    }


def _all_reduce(rank: int, device: torch.device) -> float:
    """Seconds of one all-reduce, until the device has the sum."""
    import torch
    import torch.distributed as dist

    x = torch.full((ELEMENTS,), float(rank + 1), device=device)
    _finish(device)
    started = time.perf_counter()
    dist.all_reduce(x)
    _finish(device)
    seconds = time.perf_counter() - started
    right = NUM_RANKS * (NUM_RANKS + 1) / 2
    if not bool((x == right).all()):
        raise ArithmeticError(f"an all-reduce gave {x.min().item():g} to {x.max().item():g} instead of {right:g}")
    return seconds


def _finish(device: torch.device) -> None:
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)


if __name__ == "__main__":
    main()
