"""Attention, whole layers and the loss, forward and backward, and the optimiser: the model's own modules.

Of a layer, what its matrix products, its attention and the casts of its weights take is subtracted: the rest is its
elementwise work, which is recorded as bytes per second.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from scripts.calibrating.compute import Row, compute_dtype
from scripts.calibrating.timing import Run, Stopwatch
from train.command.planning import products
from train.command.planning.measured import LARGER_BACKWARD, cast_bytes, products_seconds
from train.command.planning.profile import Profile
from train.command.planning.step_time import ADAM_BYTES
from train.config.plan import Plan
from train.config.schema import Config
from train.config.traffic import tokens_of
from train.model.transformer import Block, CrossEntropy, SdpaKernel, rope_table
from train.ranks.gradients import clip, global_norm
from train.ranks.optim import ShardOptimiser
from train.strategies.techniques import rank_of

# of the optimiser: the largest is that of a real model, the others tell latency from bandwidth
PARAMETERS, GPU_PARAMETERS = (2**23, 2**20), (2**28, 2**26, 2**22)
TENSORS = 16  # into which they are split
DEPTH = 4  # layers that run one after another, so that a cache meets other weights in each, as in a model
LEAST_REST = 0.01  # of a layer's time is elementwise work at least, so that noise never makes it negative


def both_ways(
    watch: Stopwatch, name: str, module: nn.Module, inputs: Sequence[Tensor], *, compiled: bool = False
) -> tuple[float, float] | None:
    """The seconds of a module's forward and backward; gradients are not added to older ones."""
    wanted = [x for x in (*inputs, *module.parameters()) if x.requires_grad]
    out: list[Tensor] = []

    def forward() -> None:
        out[:] = [module(*inputs)]

    def backward() -> None:
        torch.autograd.grad(out[0], wanted, ones)

    with watch.uncounted() if compiled else nullcontext():  # the first run compiles
        forward()
        ones = torch.ones_like(out[0])
        backward()
    found = watch.spans(name, [forward, backward])
    return None if found is None else (watch.mean(found[0]), watch.mean(found[1]))


def attention_rows(watch: Stopwatch, plans: Sequence[Plan]) -> list[Row]:
    """[sequences x heads, sequence length, head width, TFLOP/s forward, backward] of the model's fused kernel."""
    rows: dict[tuple[float, ...], Row] = {}
    for plan in plans:
        work, config = products.layer(rank_of(plan, 0)), plan.config
        model, sequences, seq_len = config.model, config.train.micro_batch_size, config.train.seq_len
        heads, width = round(work.heads) // sequences, model.dim // model.num_heads
        shared = max(model.num_kv_heads * heads // model.num_heads, 1)
        place = (work.heads, float(seq_len), float(width))
        if place in rows:
            continue
        sizes = [(sequences, seq_len, count, width) for count in (heads, shared, shared)]
        inputs = [_random(watch, config, *size).transpose(1, 2) for size in sizes]  # as the projections give them
        times = both_ways(watch, f"attention of {sequences} x {heads} heads, {seq_len} tokens", SdpaKernel(), inputs)
        if times is not None:
            forward, backward = work.attention_flops / times[0], LARGER_BACKWARD * work.attention_flops / times[1]
            rows[place] = [*place, forward / 1e12, backward / 1e12]
    return [*rows.values()]


class Blocks(nn.ModuleList):
    """Layers, each of which takes the result of the one before."""

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        for block in self:
            x = block(x, rope)
        return x


def layer_rows(watch: Stopwatch, plans: Sequence[Plan], profile: Profile) -> Iterator[Row]:
    """[bytes of elementwise work, GB/s forward, backward] of a layer. `plans`: of one process each."""
    for plan in plans:
        config, work = plan.config, products.layer(rank_of(plan, 0))
        depth = 1 if profile.compiled else DEPTH
        blocks = Blocks([_block(watch, config, compiled=profile.compiled) for _ in range(depth)])
        rope = rope_table(config.train.seq_len, config.model.dim // config.model.num_heads, config.model.rope_theta)
        rope = rope.to(watch.device, torch.promote_types(compute_dtype(profile.precision), torch.float32))
        x = _random(watch, config, config.train.micro_batch_size, config.train.seq_len, config.model.dim)
        name = f"layer of {tokens_of(plan)} tokens{', compiled' if profile.compiled else ''}"
        whole = both_ways(watch, name, blocks, [x, rope], compiled=profile.compiled)
        if whole is None:
            continue
        times = [seconds / len(blocks) for seconds in whole]
        rates = profile.attention_rates(work.heads, config.train.seq_len, config.model.dim // config.model.num_heads)
        attention = work.attention_flops / rates[0], LARGER_BACKWARD * work.attention_flops / rates[1]
        known = products_seconds(profile, work.matrices, tokens_of(plan))
        casts = cast_bytes(work.matrices, config.precision)
        found = []
        for i, seconds in enumerate(times):
            rest = seconds - known[i] - attention[i] - casts / profile.copy_rate(casts or 1.0)
            found.append((1 + i) * work.bytes / max(rest, LEAST_REST * seconds) / 1e9)
        yield [work.bytes, *found]


def loss_rows(watch: Stopwatch, plans: Sequence[Plan], *, compiled: bool) -> Iterator[Row]:
    """[bytes in one direction, GB/s forward, backward] of the loss."""
    for plan in plans:
        tokens, vocabulary = tokens_of(plan), plan.config.model.vocab_size
        logits = _random(watch, plan.config, 1, tokens, vocabulary)
        targets = torch.randint(vocabulary, (1, tokens), device=watch.device)
        loss = CrossEntropy()
        if compiled:
            loss.forward = torch.compile(loss.forward)  # type: ignore[method-assign]
        name = f"loss of {tokens} tokens{', compiled' if compiled else ''}"
        times = both_ways(watch, name, loss, [logits, targets], compiled=compiled)
        if times is not None:
            size = products.HEAD_BYTES * tokens * vocabulary
            yield [size, *(size / seconds / 1e9 for seconds in times)]


def optimiser_rows(watch: Stopwatch, config: Config) -> Iterator[Row]:
    """[bytes of float32 parameters, GB/s] of the gradients' norm, clipping and the update together, for sizes that fit
    into the device's memory."""
    for count in PARAMETERS if watch.device.type == "cpu" else GPU_PARAMETERS:
        with watch.uncounted():  # the first update loads a part of torch
            update = _update(watch.device, config, count)
        if watch.anywhere(update is None):
            continue
        assert update is not None
        seconds = watch.seconds(f"optimiser of {count} parameters", update)
        if seconds is not None:
            yield [4 * count, ADAM_BYTES * 4 * count / watch.mean(seconds) / 1e9]


def _update(device: torch.device, config: Config, count: int) -> Run | None:
    """An update of `count` parameters, which has run once. None if they do not fit into the device's memory."""
    try:
        ones = torch.ones(TENSORS, count // TENSORS, device=device)
        grads = [row.clone() for row in ones]
        optimiser = ShardOptimiser({str(i): nn.Parameter(row) for i, row in enumerate(ones)}, config.optim)

        def update() -> None:
            for parameter, grad in zip(optimiser.parameters.values(), grads, strict=True):
                parameter.grad = grad
            clip(grads, global_norm(grads, None, device), 1.0)
            optimiser.step(config.optim.lr)

        update()
    except torch.OutOfMemoryError:
        return None
    return update


def _random(watch: Stopwatch, config: Config, *shape: int) -> Tensor:
    dtype = compute_dtype(config.precision.value)
    return torch.randn(shape, dtype=dtype, device=watch.device).requires_grad_()


def _block(watch: Stopwatch, config: Config, *, compiled: bool) -> nn.Module:
    with torch.device("meta"):
        block = Block(config.model)
    block = block.to_empty(device=watch.device)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.02)
    if compiled:
        block.forward = torch.compile(block.forward)  # type: ignore[method-assign]
    return block
