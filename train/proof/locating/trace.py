"""Records what every module gives in one training step, and the gradient of it, on one rank.

A name in a trace is a module's global name for its output, such as `layers.0.attention.wo`, or the name with a suffix
for what goes into it: `embed:tokens`, `layers.0:input`, `layers.0.attention.kernel:q`, `loss:targets`. The order of the
names on one device is the forward order.

Hooks see nothing inside a compiled block: there, only its input and output are recorded. A block that is recomputed is
recorded when it is computed first. Experts are not recorded, because their rows are sorted by expert, and not by token:
the mixture around them is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from train.config.schema import Config
from train.config.strategy import MESH_AXES
from train.model.spans import Work, watched
from train.model.transformer import Transformer
from train.ranks.distributed import own_rows
from train.ranks.gradients import local

INPUTS = {  # the arguments of a module that are recorded, by the last part of its name
    "embed": {0: "tokens"},
    "kernel": {0: "q", 1: "k", 2: "v"},
    "loss": {1: "targets"},
}
LEFT_OUT = ("dropout", "experts")
Key = tuple[str, int]  # a name, and the number of the microbatch


@dataclass
class Trace:
    """What one rank has recorded. `place`: its place on every axis of the mesh. `rows`: its rows of the global batch.
    `forward`, `backward`: what modules give, and its gradient, on the CPU. `order`: the names, in the order in which
    they were first recorded. `gradient_scale`: see `TrainStep`."""

    place: dict[str, int]
    rows: tuple[int, int]
    micro_batch_size: int
    gradient_scale: float = 1.0
    forward: dict[Key, Tensor] = field(default_factory=dict)
    backward: dict[Key, Tensor] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)


@contextmanager
def traced(model: Transformer, mesh: DeviceMesh, config: Config, gradient_scale: float = 1.0) -> Iterator[Trace]:
    """Record all forwards and backwards of the model until the context ends. Nothing is sent."""
    rows = own_rows(mesh, config.train.global_batch_size)
    place = {axis: mesh[axis].get_local_rank() for axis in MESH_AXES}
    trace = Trace(place, (rows.start, rows.stop), config.train.micro_batch_size, gradient_scale)
    with ExitStack() as stack:
        recorder = Recorder(trace, stack.enter_context(watched()))
        for name, module in model.named_modules():
            if is_recorded(name, config):
                for handle in recorder.watch(name, module):
                    stack.callback(handle.remove)
        yield trace


def move_inputs(model: Transformer) -> None:
    """From now on, move each number that the embedding gives by one unit in the last place of the dtype in which the
    model computes. Two runs of one device, with and without this, show how far rounding alone can move what comes after
    it (TTrace, arXiv 2506.09280)."""
    unit = torch.finfo(model.compute_dtype).eps

    def moved(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        up = torch.rand(out.shape, generator=torch.Generator().manual_seed(0)).to(out.device) < 0.5
        return out * torch.where(up, 1 + unit, 1 - unit).to(out.dtype)

    assert model.embed is not None
    model.embed.register_forward_hook(moved)


def is_recorded(name: str, config: Config) -> bool:
    """Whether the module with this name is recorded. What is inside a kernel differs from strategy to strategy, and a
    loss in chunks makes the logits itself."""
    parts = name.split(".")
    if not name or name == "layers" or parts[-1] in LEFT_OUT or (config.compile.enabled and len(parts) > 2):
        return False
    if name == "head" and config.train.loss_chunks > 1:
        return False
    return not any(part in LEFT_OUT or part == "kernel" for part in parts[:-1])


class Recorder:
    """The hooks of one trace."""

    def __init__(self, trace: Trace, work: Work) -> None:
        self.trace, self.work = trace, work
        self.calls: Counter[str] = Counter()

    def watch(self, name: str, module: nn.Module) -> Iterator[Any]:
        parts = name.split(".")
        inputs = {0: "input"} if parts[0] == "layers" and len(parts) == 2 else INPUTS.get(parts[-1], {})

        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            microbatch = self.microbatch(name)
            for index, what in inputs.items():
                self.keep(f"{name}:{what}", microbatch, args[index])

        def after(module: nn.Module, args: Any, out: Any) -> None:
            microbatch = self.microbatch(name)
            if not self.recomputes:
                self.calls[name] += 1
            self.keep(name, microbatch, out[0] if isinstance(out, tuple) else out)

        if inputs:
            yield module.register_forward_pre_hook(before)
        yield module.register_forward_hook(after)

    @property
    def recomputes(self) -> bool:
        return self.work.kind in ("B", "I", "W")

    def microbatch(self, name: str) -> int:
        """The microbatch that is computed. A schedule computes the loss outside of its regions, and a user's own loop
        may have none: there, the calls of the module are counted."""
        return self.work.microbatch if self.work.kind == "F" else self.calls[name]

    def keep(self, name: str, microbatch: int, value: Any) -> None:
        key = (name, microbatch)
        if self.recomputes or not isinstance(value, Tensor) or key in self.trace.forward:
            return
        if name not in self.trace.order:
            self.trace.order.append(name)
        self.trace.forward[key] = copied(value)
        if value.requires_grad:
            value.register_hook(self.keeper(key))

    def keeper(self, key: Key) -> Callable[[Tensor], None]:
        def keep_gradient(grad: Tensor) -> None:
            # a backward in two halves may come here twice
            self.trace.backward.setdefault(key, copied(grad))

        return keep_gradient


def copied(x: Tensor) -> Tensor:
    return local(x).detach().to("cpu", copy=True)
