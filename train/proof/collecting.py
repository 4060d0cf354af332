"""Runs the steps of a strategy, and gathers what `comparison.py` compares."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from train.checkpoint.teacher import open_teacher, teach
from train.checkpoint.weights import open_weights
from train.config.schema import Config, Optimiser
from train.config.strategy import SavesState, TrainStep
from train.data.corpus import Corpus
from train.model.spans import watched
from train.model.transformer import Transformer, dtypes
from train.proof.comparison import Evidence, Named
from train.proof.locating.trace import Trace, move_inputs, traced
from train.proof.phases import Phases
from train.proof.replicas import replica_errors
from train.proof.routing import Routing, router_biases
from train.ranks.distributed import own_device, own_rows
from train.ranks.state import Piece

SGD_LR, ADAMW_LR, ADAMW_STEPS, CLIP_NORM, WEIGHT_DECAY = 0.5, 1e-3, 3, 1.0, 0.1
SECOND = 2  # the AdamW step that is traced
EVALUATED_AFTER, EVAL_BATCHES = 1, 2  # the AdamW step after which validation batches are evaluated


@dataclass
class Watch:
    """What the localisation needs of this rank, beside the evidence. `moved`: whether the inputs are moved by one unit
    of their last place. `trace` is that of the SGD step, `evaluated` of the first validation batch, and `second` of the
    second AdamW step, after which come `second_gradients`. `held`: what the rank holds after the first and the last
    AdamW step."""

    moved: bool = False
    trace: Trace | None = None
    evaluated: Trace | None = None
    second: Trace | None = None
    second_gradients: Named = field(default_factory=dict)
    held: list[list[Piece]] = field(default_factory=list)


def collect(
    config: Config, mesh: DeviceMesh, corpus: Corpus, phases: Phases, choices: Named, watch: Watch | None = None
) -> tuple[Evidence, dict[str, int]]:
    """Run steps of the strategy and gather the evidence, and facts about how it was found. Collective; `corpus` must be
    the same on every rank. `phases` measures the time of building, of the steps, and of gathering full tensors.
    `choices`: what the routers of one device chose (`Evidence.routing`); empty on one device and for a dense model.
    `watch` is filled if it is given."""
    with watched() as work:
        routing = Routing(config, mesh, work, choices)
        return _collect(config, mesh, corpus, phases, routing, watch), routing.facts()


def _collect(
    config: Config, mesh: DeviceMesh, corpus: Corpus, phases: Phases, routing: Routing, watch: Watch | None
) -> Evidence:
    device, size = own_device(mesh), config.train.global_batch_size
    rows, initial, teacher = own_rows(mesh, size), open_weights(config), open_teacher(config)

    def build(name: Optimiser) -> tuple[TrainStep, Transformer]:
        optim = dataclasses.replace(config.optim, name=name, weight_decay=WEIGHT_DECAY, momentum=0.0)
        train = dataclasses.replace(config.train, clip_norm=CLIP_NORM)
        with phases("build"):
            model = Transformer(config.model, **dtypes(config.precision))
            step = config.strategy.build(model, mesh, dataclasses.replace(config, optim=optim, train=train))
            if teacher is not None:
                teach(step, teacher, mesh, config)
            if initial is not None:
                assert isinstance(step, SavesState)
                initial.fill(step)
            routing.attach(model)
            return step, model

    def batch(step: int) -> tuple[Tensor, Tensor]:
        tokens, targets = corpus.batch(step, size, rows)
        return tokens.to(device), targets.to(device)

    def evaluations(step: TrainStep, model: Transformer) -> Named:
        found: Named = {}
        for index in range(EVAL_BATCHES):
            routing.phase(f"evaluation {index + 1}")
            inputs = (x.to(device) for x in corpus.validation_batch(index, EVAL_BATCHES, size, rows))
            with ExitStack() as stack:
                if watch is not None and index == 0:
                    watch.evaluated = stack.enter_context(traced(model, mesh, config))
                loss_sum, num_valid = step.evaluate(*inputs)
            found[f"batch {index + 1}, sum of losses"] = loss_sum.cpu()
            found[f"batch {index + 1}, number of tokens"] = num_valid.cpu()
        return found

    step, model = build(Optimiser.sgd)
    gradients: Named = {}

    def keep(step: TrainStep, kept: Named) -> None:
        with phases("gather"):
            kept.update(_whole(step.full_gradients()))

    step.on_gradients = partial(keep, step, gradients)
    routing.phase("sgd step")
    with phases("steps"), ExitStack() as stack:
        if watch is not None:
            if watch.moved:
                move_inputs(model)
            watch.trace = stack.enter_context(traced(model, mesh, config, step.gradient_scale))
        result = step(*batch(1), lr=SGD_LR)
    with phases("gather"):
        weights = _whole(step.full_parameters())
    of_eight_bits = config.optim.name is Optimiser.adamw8bit
    step, model = build(Optimiser.adamw8bit if of_eight_bits else Optimiser.adamw)
    if watch is not None and watch.moved:
        move_inputs(model)
    losses: Named = {}
    evaluated: Named = {}
    biases: Named = {}
    for i in range(1, ADAMW_STEPS + 1):
        routing.phase(f"step {i}")
        with phases("steps"), ExitStack() as stack:
            if watch is not None and i == SECOND:
                watch.second = stack.enter_context(traced(model, mesh, config, step.gradient_scale))
                step.on_gradients = partial(keep, step, watch.second_gradients)
                stack.callback(setattr, step, "on_gradients", None)
            losses[f"step {i}"] = step(*batch(i), lr=ADAMW_LR).loss.cpu()
        biases |= {f"step {i} {name}": bias for name, bias in router_biases(model, mesh, config).items()}
        if watch is not None and i in (1, ADAMW_STEPS):
            watch.held.append([dataclasses.replace(one, tensor=one.tensor.cpu().clone()) for one in step.pieces()])
        if i == EVALUATED_AFTER:
            with phases("evaluate"):
                evaluated = evaluations(step, model)
    routing.detach(model)
    for i in range(ADAMW_STEPS + 1, next_meeting(config) + 1):
        step(*batch(i), lr=ADAMW_LR)
    with phases("replicas"):
        replicas = replica_errors(step.pieces(), mesh)
    return Evidence(
        loss={"loss": result.loss.cpu()},
        gradients=gradients,
        grad_norm={"norm": result.grad_norm.cpu()},
        sgd_weights=weights,
        adamw_loss=losses,
        evaluate=evaluated,
        routing=routing.collect(),
        router_bias=biases,
        replicas=replicas,
    )


def next_meeting(config: Config) -> int:
    """The first step, from the last compared AdamW step on, after which all copies of a weight are equal."""
    every = config.strategy.meets_every()
    return -(-ADAMW_STEPS // every) * every


def _whole(tensors: object) -> Named:
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors}  # type: ignore[attr-defined]
