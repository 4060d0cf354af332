"""Counts the memory of a step that is run with fake tensors: which tensors live at the peak, and of which kind they are.

    parameters, gradients, optimiser   what the rank keeps; gradients are those that exist when the update begins
    unsharded      what FSDP gathers, and gradients before their reduction
    activations    allocated in a forward, and not freed yet
    logits         allocated by the head and the loss, and in the backward before it reaches the head's input
    temporary      allocated in the backward or in the update
    pipeline       what a schedule receives into
    fixed          allocated before the first step, and none of the above
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from train.model.spans import Work, watched
from train.ranks.gradients import local

FSDP_CALLS = ("unshard", "wait_for_unshard", "post_backward", "finalize_backward")


@dataclass
class Block:
    """A storage. `what`: the operator, dtype and shape that made it."""

    kind: str
    what: str
    size: int = 0


@dataclass
class Memory(TorchDispatchMode):
    """Records every allocation and every free, in order."""

    kind: str = "fixed"
    events: list[tuple[Block, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.blocks: dict[int, Block] = {}
        self.work = Work()
        self.inside: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor runs the operator on its shard, and that comes back here
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.see(x, str(func))
        return out

    def see(self, x: Tensor, made_by: str) -> None:
        storage = x.untyped_storage()
        if storage._cdata in self.blocks:
            return
        block = self.blocks[storage._cdata] = Block(self.kind_now(), f"{made_by} {x.dtype} {tuple(x.shape)}")
        self.change(block, storage.nbytes())
        weakref.finalize(storage, self.gone, storage._cdata, block)

    def gone(self, key: int, block: Block) -> None:
        if self.blocks.get(key) is block:
            del self.blocks[key]
        self.change(block, 0)

    def change(self, block: Block, size: int) -> None:
        if size != block.size:
            self.events.append((block, size - block.size))
            block.size = size

    def kind_now(self) -> str:
        if self.inside:
            return self.inside[-1]
        if self.work.kind is None:
            return self.kind
        return "activations" if self.work.kind == "F" else "temporary"

    def block_of(self, x: Tensor) -> Block | None:
        return self.blocks.get(local(x).untyped_storage()._cdata)

    def name(self, tensors: Iterable[Tensor | None], kind: str) -> None:
        for x in tensors:
            if x is not None and (block := self.block_of(x)) is not None:
                block.kind = kind

    @contextmanager
    def within(self, kind: str):
        self.inside.append(kind)
        try:
            yield
        finally:
            self.inside.remove(kind)

    @contextmanager
    def recording(self):
        """Record until the context ends, FSDP's resized storages too."""
        resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if (block := self.blocks.get(storage._cdata)) is not None:
                self.change(block, size)
            return result

        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(torch.UntypedStorage, "resize_", resize_))
            for name in FSDP_CALLS:
                call = getattr(FSDPParamGroup, name)
                stack.enter_context(mock.patch.object(FSDPParamGroup, name, self.of_fsdp(call)))
            self.work = stack.enter_context(watched())
            stack.enter_context(self)
            yield

    def of_fsdp(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(group: FSDPParamGroup, *args: Any, **options: Any) -> Any:
            self.name_unsharded(group)
            with self.within("unsharded"):
                result = call(group, *args, **options)
            self.name_unsharded(group)
            return result

        return called

    def name_unsharded(self, group: FSDPParamGroup) -> None:
        """Gradients that autograd has put beside gathered parameters."""
        for one in group.fsdp_params:
            whole = getattr(one, "_unsharded_param", None)
            self.name((getattr(whole, "grad", None), one.unsharded_accumulated_grad), "unsharded")

    def watch_logits(self, model: nn.Module) -> None:
        """The regions of the head and of the loss, forward and backward."""
        regions: list[Any] = []

        def enter(*_: Any) -> None:
            regions.append(self.within("logits"))
            regions[-1].__enter__()

        def leave(*_: Any) -> None:
            if regions:
                regions.pop().__exit__(None, None, None)

        def before_head(module: nn.Module, args: Any) -> None:
            if torch.is_grad_enabled() and args[0].requires_grad:
                args[0].register_hook(leave)
            enter()

        def after_loss(module: nn.Module, args: Any, out: Tensor) -> None:
            leave()
            if out.requires_grad:
                out.register_hook(enter)

        if model.head is not None:
            model.head.register_forward_pre_hook(before_head, prepend=True)
            model.head.register_forward_hook(leave)
            model.loss.register_forward_pre_hook(enter, prepend=True)
            model.loss.register_forward_hook(after_loss)

    def peak(self, start: int = 0) -> tuple[int, dict[str, int], Counter[str]]:
        """(bytes, bytes by kind, bytes by kind and what) at the peak after event number `start`."""
        held: Counter[int] = Counter()
        total = best = 0
        at = 0
        for i, (_, change) in enumerate(self.events):
            total += change
            if i >= start and total > best:
                best, at = total, i
        blocks = {}
        for block, change in self.events[: at + 1]:
            held[id(block)] += change
            blocks[id(block)] = block
        kinds, whats = Counter[str](), Counter[str]()
        for key, size in held.items():
            if size:
                kinds[blocks[key].kind] += size
                whats[f"{blocks[key].kind}: {blocks[key].what}"] += size
        return best, dict(kinds), whats
