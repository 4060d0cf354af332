"""Runs the steps of a strategy, and gathers what `comparison.py` compares."""

from __future__ import annotations

import dataclasses

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from train.config.schema import Config, Optimiser
from train.config.strategy import TrainStep
from train.data.corpus import Corpus
from train.model.spans import watched
from train.model.transformer import Transformer, dtypes
from train.proof.comparison import Evidence, Named
from train.proof.phases import Phases
from train.proof.routing import Routing, router_biases
from train.ranks.distributed import own_device, own_rows

SGD_LR, ADAMW_LR, ADAMW_STEPS, CLIP_NORM = 0.5, 1e-3, 3, 1.0


def collect(
    config: Config, mesh: DeviceMesh, corpus: Corpus, phases: Phases, choices: Named
) -> tuple[Evidence, dict[str, int]]:
    """Run steps of the strategy and gather the evidence, and facts about how it was found. Collective; `corpus` must be
    the same on every rank. `phases` measures the time of building, of the steps, and of gathering full tensors.
    `choices`: what the routers of one device chose (`Evidence.routing`); empty on one device and for a dense model."""
    with watched() as work:
        return _collect(config, mesh, corpus, phases, Routing(config, mesh, work, choices))


def _collect(
    config: Config, mesh: DeviceMesh, corpus: Corpus, phases: Phases, routing: Routing
) -> tuple[Evidence, dict[str, int]]:
    device, size = own_device(mesh), config.train.global_batch_size
    rows = own_rows(mesh, size)

    def build(name: Optimiser) -> tuple[TrainStep, Transformer]:
        optim = dataclasses.replace(config.optim, name=name, weight_decay=0.1, momentum=0.0)
        train = dataclasses.replace(config.train, clip_norm=CLIP_NORM)
        with phases("build"):
            model = Transformer(config.model, **dtypes(config.precision))
            step = config.strategy.build(model, mesh, dataclasses.replace(config, optim=optim, train=train))
            routing.attach(model)
            return step, model

    def batch(step: int) -> tuple[Tensor, Tensor]:
        tokens, targets = corpus.batch(step, size, rows)
        return tokens.to(device), targets.to(device)

    step, _ = build(Optimiser.sgd)
    gradients: Named = {}

    def keep_gradients() -> None:
        with phases("gather"):
            gradients.update(_whole(step.full_gradients()))

    step.on_gradients = keep_gradients
    routing.phase("sgd step")
    with phases("steps"):
        result = step(*batch(1), lr=SGD_LR)
    with phases("gather"):
        weights = _whole(step.full_parameters())
    step, model = build(Optimiser.adamw)
    losses: Named = {}
    biases: Named = {}
    for i in range(1, ADAMW_STEPS + 1):
        routing.phase(f"step {i}")
        with phases("steps"):
            losses[f"step {i}"] = step(*batch(i), lr=ADAMW_LR).loss.cpu()
        biases |= {f"step {i} {name}": bias for name, bias in router_biases(model, mesh, config).items()}
    evidence = Evidence(
        loss={"loss": result.loss.cpu()},
        gradients=gradients,
        grad_norm={"norm": result.grad_norm.cpu()},
        sgd_weights=weights,
        adamw_loss=losses,
        routing=routing.collect(),
        router_bias=biases,
    )
    return evidence, routing.facts()


def _whole(tensors: object) -> Named:
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors}  # type: ignore[attr-defined]
