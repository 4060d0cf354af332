"""Evidence that a strategy computes the same as one device, from identical weights on the same global batch.

It has five columns:
- the loss
- every gradient, before clipping
- the global gradient norm
- every weight after one clipped SGD step, whose learning rate is so large that a factor of two is visible; so a wrong
  norm is visible in the weights
- the loss over a few AdamW steps

The loss under AdamW alone proves little: if every gradient is four times too large, it changes by 2e-5 in six steps. A
mixture of experts has two more columns over the AdamW steps: the experts that every token chose, and the biases of the
routers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from train.config.schema import Config, Optimiser, Precision
from train.config.strategy import TrainStep
from train.data.corpus import Corpus
from train.model.transformer import Transformer, dtypes
from train.proof.phases import Phases
from train.ranks.distributed import own_device, own_rows
from train.strategies.expert.balance import RoutingRecord

SGD_LR, ADAMW_LR, ADAMW_STEPS, CLIP_NORM = 0.5, 1e-3, 3, 1.0
# bf16 rounds with a relative error of 2^-8; sums of rounded terms in another order differ by a few of these errors
BOUNDS = {Precision.float64: 1e-9, Precision.float32: 1e-5, Precision.bf16: 3e-2}
# A tensor that is smaller than this part of the global gradient norm is rounding noise: its error is relative to the
# norm.
NEGLIGIBLE = 1e-6
# If the scores of two experts are closer than this, rounding decides between them, and all that follows is random.
LEAST_MARGIN = {Precision.float64: 1e-8, Precision.float32: 1e-4, Precision.bf16: 3e-2}

Named = dict[str, Tensor]


@dataclass
class Evidence:
    """Full (unsharded) tensors on the CPU, by column and then by name."""

    loss: Named
    gradients: Named
    grad_norm: Named
    sgd_weights: Named
    adamw_loss: Named
    routing: Named
    router_bias: Named


@dataclass(frozen=True)
class Verdict:
    """The tensor of a column with the largest error. `error`: max|a-b| / max|b|, infinite for NaN. `differs`: the
    reason why the strategy is expected to differ in this column; empty if it must be equal."""

    column: str
    name: str
    error: float
    bound: float
    differs: str = ""

    @property
    def equal(self) -> bool:
        return self.error <= self.bound

    @property
    def ok(self) -> bool:
        return self.equal or (bool(self.differs) and math.isfinite(self.error))


def collect(config: Config, mesh: DeviceMesh, corpus: Corpus, phases: Phases) -> Evidence:
    """Run steps of the strategy and gather the evidence. Collective; `corpus` must be the same on every rank. `phases`
    measures the time of building, of the steps, and of gathering full tensors."""
    device, size = own_device(mesh), config.train.global_batch_size
    rows = own_rows(mesh, size)

    def build(name: Optimiser) -> tuple[TrainStep, Transformer]:
        optim = dataclasses.replace(config.optim, name=name, weight_decay=0.1, momentum=0.0)
        train = dataclasses.replace(config.train, clip_norm=CLIP_NORM)
        with phases("build"):
            model = Transformer(config.model, **dtypes(config.precision))
            return config.strategy.build(model, mesh, dataclasses.replace(config, optim=optim, train=train)), model

    def batch(step: int) -> tuple[Tensor, Tensor]:
        tokens, targets = corpus.batch(step, size, rows)
        return tokens.to(device), targets.to(device)

    step, _ = build(Optimiser.sgd)
    gradients: Named = {}

    def keep_gradients() -> None:
        with phases("gather"):
            gradients.update(_whole(step.full_gradients()))

    step.on_gradients = keep_gradients
    with phases("steps"):
        result = step(*batch(1), lr=SGD_LR)
    with phases("gather"):
        weights = _whole(step.full_parameters())
    step, model = build(Optimiser.adamw)
    record, losses = RoutingRecord(model, mesh, config, rows), []
    routing: Named = {}
    biases: Named = {}
    for i in range(1, ADAMW_STEPS + 1):
        with phases("steps"):
            losses.append(step(*batch(i), lr=ADAMW_LR).loss)
        chosen, router_biases, margin = record.collect()
        routing |= {f"step {i} {name}": choice for name, choice in chosen.items()}
        biases |= {f"step {i} {name}": bias for name, bias in router_biases.items()}
        if margin < LEAST_MARGIN[config.precision]:
            raise ValueError(
                f"step {i}: the scores of a token's last chosen expert and of the next one differ by {margin:.1e}, "
                f"less than {LEAST_MARGIN[config.precision]:.0e}, so rounding decides between them. Use another "
                "train.seed, fewer tokens, or precision=float64"
            )
    return Evidence(
        loss={"loss": result.loss.cpu()},
        gradients=gradients,
        grad_norm={"norm": result.grad_norm.cpu()},
        sgd_weights=weights,
        adamw_loss={f"step {i}": loss.cpu() for i, loss in enumerate(losses, start=1)},
        routing=routing,
        router_bias=biases,
    )


def _whole(tensors: object) -> Named:
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors}  # type: ignore[attr-defined]


_COLUMNS = dataclasses.fields(Evidence)


def compare(
    found: Evidence, reference: Evidence, bound: float, differs: Mapping[str, str] = MappingProxyType({})
) -> list[Verdict]:
    """The largest error of every column that either side has. `differs`: the reasons of the strategy, by column."""
    norm = float(reference.grad_norm["norm"])
    columns = [(field.name, *(getattr(side, field.name) for side in (found, reference))) for field in _COLUMNS]
    verdicts = [_worst(name, a, b, norm, bound) for name, a, b in columns if a or b]
    return [dataclasses.replace(verdict, differs=differs.get(verdict.column, "")) for verdict in verdicts]


def _worst(column: str, found: Named, reference: Named, norm: float, bound: float) -> Verdict:
    if missing := found.keys() ^ reference.keys():
        return Verdict(column, f"{min(missing)} is only on one side", float("inf"), bound)
    errors = []
    for name, b in reference.items():
        a = found[name].double()
        if a.shape != b.shape:
            return Verdict(column, f"{name} has shape {tuple(a.shape)}, not {tuple(b.shape)}", float("inf"), bound)
        scale = float(b.abs().max())
        error = float((a - b.double()).abs().max()) / (scale if scale > NEGLIGIBLE * norm else norm)
        errors.append((float("inf") if error != error else error, name))
    error, name = max(errors)
    return Verdict(column, name, error, bound)
