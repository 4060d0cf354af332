"""Inputs of layers in the host's memory between their forward and their backward, with copies beside the computation.

With full recomputation a layer keeps its input alone, so that these are all activations of the layers. The layer runs
under hooks for what autograd saves (`torch.autograd.graph.saved_tensors_hooks`), which give autograd an `Input` in
place of the tensor:

    forward       copy of x_1   | x_2       | x_3          a layer's input leaves while the layer computes
                  layer 1       | layer 2   | layer 3
    backward      layer 3       | layer 2   | layer 1
                  copy of x_2   | x_1       |              and comes back while the layer above computes

So a rank has two inputs on the device at a time. torch's own `save_on_cpu` makes the same copies, but the host waits
for each on its way there, and the computation for each on its way back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from train.config.technique import Target


def apply_offloading(target: Target) -> None:
    offloading = Offloading(target.mesh.device_type)
    for number, layer in enumerate(target.model.layers.values()):
        layer.forward = offloading.around(layer.forward, first=number == 0)


class Offloading:
    """The copies of a model's layers, which take turns on one stream. `device_type`: on a CPU, an input is copied and
    comes back at once, so that the way of the tensors can be proven there."""

    def __init__(self, device_type: str) -> None:
        self.stream = torch.cuda.Stream() if device_type == "cuda" else None
        self.newest: Input | None = None

    def around(self, forward: Callable[..., Tensor], *, first: bool) -> Callable[..., Tensor]:
        """The forward of a layer, whose first argument is its input. `first`: of the model's layers."""

        def offloading(x: Tensor, *more: Any) -> Tensor:
            if not torch.is_grad_enabled():
                return forward(x, *more)
            if self.newest is not None:
                self.newest.leave()
            kept = self.newest = Input(x, self.stream, before=None if first else self.newest)

            # Autograd keeps this function as long as what it returns, so it has no reference to x.
            def packed(saved: Tensor) -> Tensor | Input:
                return kept if kept.x is not None and saved.is_set_to(kept.x) else saved

            with saved_tensors_hooks(packed, unpacked):
                return forward(x, *more)

        return offloading


def unpacked(saved: Tensor | Input) -> Tensor:
    return saved.taken() if isinstance(saved, Input) else saved


class Input:
    """A layer's input, of which a copy is made in the host's memory. `before`: the input of the layer before, which the
    backward needs next.

    Memory of the device belongs to the stream of the computation, where it is allocated and freed. Therefore the stream
    of the copies waits for the computation before it writes, and the computation for the copy before it reads x, or
    frees it. An input that was fetched must be taken: a backward goes through all layers, or the run ends.
    """

    def __init__(self, x: Tensor, stream: torch.cuda.Stream | None, before: Input | None) -> None:
        self.x: Tensor | None = x.detach()  # on the device, as long as it is there
        self.device, self.stream, self.before = x.device, stream, before
        self.host = torch.empty_like(x, device="cpu", pin_memory=stream is not None)
        self.copied = self.copy(self.host, self.x)

    def copy(self, to: Tensor, source: Tensor) -> torch.cuda.Event | None:
        """Copies when the computation has come this far. Returns an event after the copy."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):  # None changes nothing
            to.copy_(source, non_blocking=True)
        return None if self.stream is None else self.stream.record_event()

    def wait(self) -> None:
        """The computation goes on after the last copy."""
        if self.copied is not None:
            torch.cuda.current_stream().wait_event(self.copied)

    def leave(self) -> None:
        """Free the device's memory."""
        if self.x is not None:
            self.wait()
            self.x = None

    def fetch(self) -> None:
        """Begin the copy back, if the input is not on the device."""
        if self.x is None:
            self.x = torch.empty_like(self.host, device=self.device)
            self.copied = self.copy(self.x, self.host)

    def taken(self) -> Tensor:
        """The input on the device, for the backward, after which it is not kept there. The next one is fetched. A
        second backward fetches it again."""
        self.fetch()
        self.wait()
        x, self.x = self.x, None
        if self.before is not None:
            self.before.fetch()
            self.before = None
        assert x is not None
        return x
