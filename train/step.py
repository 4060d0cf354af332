"""One optimiser step: count tokens, forward, backward, reduce, clip, update. DeepSpeed has steps of its own."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from train.config.schema import OnNonfinite
from train.config.strategy import LOSS_AXES, Read, StepResult
from train.model.spans import span
from train.model.transformer import Transformer
from train.model.weights import global_parameters
from train.ranks import gradients
from train.ranks.distributed import count_valid, inverse_valid, own_rows, sum_over
from train.ranks.optim import ShardOptimiser
from train.ranks.state import Piece, ShardedState
from train.ranks.zeros import KeptZeros
from train.strategies.data.apply import Replica, microbatch
from train.strategies.expert.balance import LoadBalance

if TYPE_CHECKING:
    from train.config.schema import Config

CODES = "codes"  # of an optimiser's state in few bits: the beginning of their names in a checkpoint
# (tokens BT, targets BT, 1 / global number of valid tokens) -> this rank's share of the mean loss; it fills `.grad` too
ForwardBackward = Callable[[Tensor, Tensor, Tensor], Tensor]
# It gets the function that makes the update.
BeforeUpdate = Callable[[Callable[[], StepResult]], None]
# (tokens BT, targets BT) -> this rank's sum of token losses
Evaluate = Callable[[Tensor, Tensor], Tensor]


class Step:
    """A `TrainStep`. SPMD strategies and pipelines differ in `forward_backward` and `forward` only.

    `shared`: parameters of which another rank holds a copy. `wrapped`: the modules that are called, one for each stage
    of this rank; those of DDP have a state that a resume must restore.
    """

    gradient_scale = 1.0

    def __init__(
        self,
        model: Transformer,
        mesh: DeviceMesh,
        config: Config,
        forward_backward: ForwardBackward,
        forward: Evaluate,
        shared: Sequence[gradients.SharedParameter] = (),
        wrapped: Sequence[nn.Module] = (),
    ) -> None:
        self.model, self.mesh, self.clip_norm = model, mesh, config.train.clip_norm
        self.skips = config.train.on_nonfinite is OnNonfinite.skip
        self.forward_backward, self.forward, self.shared = forward_backward, forward, shared
        self.replicas = [module for module in wrapped if isinstance(module, Replica)]
        rows = own_rows(mesh, config.train.global_batch_size, multiple=config.train.micro_batch_size)
        self.batch_shape = (rows.stop - rows.start, config.train.seq_len)
        self.on_gradients: Callable[[], None] | None = None
        self.before_update: BeforeUpdate | None = None  # called when everything is sent, before the state changes
        # collected now, because `model.parameters()` does not give the shards of a block that FSDP has gathered
        self.parameters = global_parameters(model, config.model)
        self.optimiser = ShardOptimiser(self.parameters, config.optim)
        self.zeros = KeptZeros(self.parameters.values()) if config.train.keep_zeros else None
        self.balance = LoadBalance(model, mesh, config)
        self.state = ShardedState(self.parameters, self.optimiser.inner, mesh["pp"].get_group(), config.model)

    def __call__(self, tokens: Tensor, targets: Tensor, *, lr: float) -> StepResult:
        """tokens, targets: this rank's rows [B, T] of the global batch; ranks that differ only in pp, cp or tp get the
        same rows."""
        inverse_num_valid = inverse_valid(targets, self.mesh, self.model.rope.dtype)  # the dtype of losses
        loss = sum_over(self.forward_backward(tokens, targets, inverse_num_valid), self.mesh, *LOSS_AXES)
        with span("optimiser"):
            norm = self.update(lr, loss)
        return StepResult(loss=loss, grad_norm=norm, extras=self.balance.update())

    def update(self, lr: float, loss: Tensor) -> Tensor:
        """Complete the gradients, clip them and update the weights. Returns the global norm before clipping."""
        parameters = [p for p in self.parameters.values() if p.grad is not None]
        gradients.reduce_partial(parameters)
        gradients.sum_shared(self.shared, self.model.rope.device)
        if self.zeros is not None:
            self.zeros.mask_gradients()
        self.state.note_gradients()
        if self.on_gradients is not None:
            self.on_gradients()
        grads = [p.grad for p in parameters if p.grad is not None]
        counted_elsewhere = {item.parameter for item in self.shared if not item.counted}
        counted = [p.grad for p in parameters if p.grad is not None and p not in counted_elsewhere]
        norm = gradients.global_norm(counted, self.mesh["pp"].get_group(), self.model.rope.device)
        change = partial(self.change, grads, norm, loss, lr)
        if self.before_update is not None:
            self.before_update(change)
        return change().grad_norm

    def change(self, grads: Sequence[Tensor], norm: Tensor, loss: Tensor, lr: float) -> StepResult:
        """Clip complete gradients and update the weights. Nothing is sent. So a rank makes an update wholly or not at
        all, and can make it after other ranks have ended."""
        if self.skips and not bool(norm.isfinite() & loss.isfinite()):  # the same on every rank
            self.skip()
            return StepResult(loss, norm)
        if self.clip_norm > 0:
            gradients.clip(grads, norm, self.clip_norm)
        self.optimiser.step(lr)
        if self.zeros is not None:
            self.zeros.after_update()
        return StepResult(loss, norm)

    def skip(self) -> None:
        """Throw the gradients away, and what was counted and kept in this step."""
        for parameter in self.parameters.values():
            parameter.grad = None
        self.balance.reset()
        for one in self.replicas:
            if one.compression is not None:
                one.compression.forget()

    @torch.no_grad()
    def evaluate(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        self.model.eval()  # no dropout
        loss_sum = sum_over(self.forward(tokens, targets), self.mesh, *LOSS_AXES)
        self.model.train()
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # no backward follows that would free the gathered parameters
        return loss_sum, count_valid(targets, self.mesh)

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return self.state.full(lambda p: p.detach())

    def full_gradients(self) -> Iterator[tuple[str, Tensor]]:
        return self.state.full(lambda p: p.grad)

    def pieces(self) -> Iterator[Piece]:
        kept = self.optimiser.inner.state
        return self.state.pieces(self.model, lambda name, _: kept.get(self.optimiser.shards[name], {}))

    def saved(self) -> Iterator[Piece]:
        return self.pieces()

    def restore(self, read: Read, known: Container[str]) -> None:
        self.rehearse()
        self.optimiser.make_state()
        pieces = [*self.saved()]
        with_state = {piece.name for piece in pieces if piece.of_optimiser and piece.key in known}
        read([piece for piece in pieces if not piece.of_optimiser or piece.name in with_state])
        self.optimiser.take(pieces)
        for name in self.optimiser.shards.keys() - with_state:  # it had no gradient until then
            self.optimiser.inner.state.pop(self.optimiser.shards[name], None)

    def rehearse(self) -> None:
        """Run a backward whose gradients are thrown away, if the model is replicated. DDP forms its buckets anew after
        its first backward, so without this the first step after a resume would sum in another order than the same step
        of a run that was not interrupted."""
        if not self.replicas:
            return
        tokens = torch.zeros(self.batch_shape, dtype=torch.long, device=self.model.rope.device)
        self.forward_backward(tokens, tokens, torch.ones_like(self.model.rope[0, 0, 0]))
        self.skip()

    def own_state(self) -> dict[str, Tensor]:
        hooks = [(i, one.compression) for i, one in enumerate(self.replicas) if one.compression is not None]
        found = {f"powersgd/{i}/{name}": tensor for i, hook in hooks for name, tensor in hook.tensors().items()}
        return found | {f"{CODES}/{name}": tensor for name, tensor in self.optimiser.codes().items()}

    def load_own_state(self, tensors: Mapping[str, Tensor]) -> None:
        for name, part in self.optimiser.codes().items():
            if (key := f"{CODES}/{name}") in tensors:
                part.copy_(tensors[key])
        for i, one in enumerate(self.replicas):
            if one.compression is not None:
                head = f"powersgd/{i}/"
                own = {k.removeprefix(head): x for k, x in tensors.items() if k.startswith(head)}
                one.compression.load({name: x.to(self.model.rope.device) for name, x in own.items()})

    def state_tensors(self) -> dict[str, Iterable[Tensor]]:
        return self.state.state_tensors()

    def state_bytes(self) -> dict[str, int]:
        return self.state.state_bytes()


def accumulate(
    wrapped: nn.Module, model: Transformer, config: Config, zero_stage: int
) -> tuple[ForwardBackward, Evaluate]:
    """The two callables of an SPMD `Step`, which run microbatches one after the other. Gradients are reduced after the
    last microbatch only, where data parallelism allows it."""
    rows = config.train.micro_batch_size

    def forward_backward(tokens: Tensor, targets: Tensor, inverse_num_valid: Tensor) -> Tensor:
        losses = []
        batches = list(zip(tokens.split(rows), targets.split(rows), strict=True))
        for i, (inputs, labels) in enumerate(batches):
            with microbatch(wrapped, zero_stage, last=i == len(batches) - 1):
                with span("F", 0, i):
                    loss = model.loss(wrapped(inputs), labels) * inverse_num_valid
                with span("B", 0, i):
                    loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def forward(tokens: Tensor, targets: Tensor) -> Tensor:
        losses = []
        for i, (inputs, labels) in enumerate(zip(tokens.split(rows), targets.split(rows), strict=True)):
            with span("F", 0, i):
                losses.append(model.loss(wrapped(inputs), labels))
        return torch.stack(losses).sum()

    return forward_backward, forward
