"""Counts the memory of a step that runs with fake tensors: which tensors live at the peak, and of which kind they are.

parameters, gradients, optimiser   what the rank keeps, and gradients that became these
unsharded     allocated by FSDP, and gradients before their reduction
activations   allocated in a forward, and not freed yet
logits        allocated by the head and the loss, and in the backward before it reaches the head's input
temporary     allocated in the backward or in the update
pipeline      what a schedule allocates at its first step and keeps
buffers       allocated before the first step, and none of the above
"""

import weakref
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from train.model.spans import Work, watched
from train.ranks.gradients import local

FSDP_CALLS = ("unshard", "wait_for_unshard", "post_backward", "finalize_backward")


@dataclass(eq=False)
class Block:
    """A storage. `what`: the operator, dtype and shape that made it."""

    kind: str
    what: str
    size: int = 0


class Memory(TorchDispatchMode):
    """Records every allocation and every free, in order."""

    def __init__(self):
        super().__init__()
        self.kind = "buffers"  # of what is allocated outside forwards and backwards
        self.events: list[tuple[Block, int]] = []
        self.blocks: dict[int, Block] = {}
        self.work = Work()
        self.inside: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor runs the operator on its shard, and that comes back here
        if func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]  # as on a device; a fake one would be a copy
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.device.type != "meta":
                self.see(x, str(func))
        return out

    def see(self, x, made_by):
        storage = x.untyped_storage()
        if storage._cdata not in self.blocks:
            block = self.blocks[storage._cdata] = Block(self.kind_now(), f"{made_by} {x.dtype} {tuple(x.shape)}")
            self.change(block, storage.nbytes())
            weakref.finalize(storage, self.gone, storage._cdata, block)

    def gone(self, key, block):
        if self.blocks.get(key) is block:
            del self.blocks[key]
        self.change(block, 0)

    def change(self, block, size):
        if size != block.size:
            self.events.append((block, size - block.size))
            block.size = size

    def kind_now(self):
        if self.inside:
            return self.inside[-1]
        if self.work.kind is None:
            return self.kind
        return "activations" if self.work.kind == "F" else "temporary"

    def name(self, tensors, kind):
        """These tensors are of this kind, and always were."""
        for x in tensors:
            if x is not None and (block := self.blocks.get(local(x).untyped_storage()._cdata)) is not None:
                block.kind = kind

    def rename(self, old, new):
        for block in self.blocks.values():
            if block.kind == old:
                block.kind = new

    @contextmanager
    def within(self, kind):
        self.inside.append(kind)
        try:
            yield
        finally:
            self.inside.remove(kind)

    @contextmanager
    def recording(self):
        """Record until the context ends. FSDP resizes storages, which no operator shows."""
        resize = torch.UntypedStorage.resize_

        def resize_(storage, size):
            result = resize(storage, size)
            if (block := self.blocks.get(storage._cdata)) is not None:
                self.change(block, size)
            return result

        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(torch.UntypedStorage, "resize_", resize_))
            for name in FSDP_CALLS:
                call = self.of_fsdp(getattr(FSDPParamGroup, name))
                stack.enter_context(mock.patch.object(FSDPParamGroup, name, call))
            self.work = stack.enter_context(watched())
            stack.enter_context(self)
            yield

    def of_fsdp(self, call):
        def called(group, *args, **options):
            self.name_unsharded(group)
            with self.within("unsharded"):
                result = call(group, *args, **options)
            self.name_unsharded(group)
            return result

        return called

    def name_unsharded(self, group):
        """Gradients that autograd has put beside gathered parameters."""
        for one in group.fsdp_params:
            whole = getattr(one, "_unsharded_param", None)
            self.name((getattr(whole, "grad", None), one.unsharded_accumulated_grad), "unsharded")

    def watch_logits(self, model):
        """Mark what the head and the loss allocate, forward and backward."""
        regions = []

        def enter(*_):
            regions.append(self.within("logits"))
            regions[-1].__enter__()

        def leave(*_):
            if regions:
                regions.pop().__exit__(None, None, None)

        def enter_backward(*_):
            if self.work.kind != "W":  # only weights' gradients are computed, and the head's input gets none
                enter()

        def before_head(module, args):
            if torch.is_grad_enabled() and args[0].requires_grad:
                args[0].register_hook(leave)
            enter()

        def after_loss(module, args, out):
            leave()
            if out.requires_grad:
                out.register_hook(enter_backward)

        if model.head is not None:
            model.head.register_forward_pre_hook(before_head, prepend=True)
            model.head.register_forward_hook(leave)
            model.loss.register_forward_pre_hook(enter, prepend=True)
            model.loss.register_forward_hook(after_loss)

    def peak(self, start):
        """(bytes by kind, bytes by kind and operator) at the peak after event number `start`."""
        total = best = at = 0
        for i, (_, change) in enumerate(self.events):
            total += change
            if i >= start and total > best:
                best, at = total, i
        kinds, whats = Counter[str](), Counter[str]()
        for block, change in self.events[: at + 1]:
            kinds[block.kind] += change
            whats[f"{block.kind}: {block.what}"] += change
        return {kind: size for kind, size in kinds.items() if size}, whats
