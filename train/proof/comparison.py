"""Evidence that a strategy computes the same as one device, from identical weights on the same global batch.

It has these columns:
- the loss
- every gradient, before clipping
- the global gradient norm
- every weight after one clipped SGD step, whose learning rate is so large that a factor of two is visible; so a wrong
  norm is visible in the weights
- the loss over a few AdamW steps
- `evaluate`: the sum of losses and the number of tokens of each validation batch, between two AdamW steps. The numbers
  of tokens must be equal; the next step shows whether the evaluation has changed anything
- the copies of weights, moments and buffers that several ranks hold: after the AdamW steps they must be bitwise equal

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

from train.config.schema import Config, Precision

# bf16 rounds with a relative error of 2^-8; sums of rounded terms in another order differ by a few of these errors
BOUNDS = {Precision.float64: 1e-9, Precision.float32: 1e-5, Precision.bf16: 3e-2, Precision.fp8: 3e-2}
# Ranks that share a sequence add gradients of activations in another order, and some fall into another step of e5m2;
# its steps are 2^-2 apart. The largest error that was measured is 8.9e-2, under cp=2.
SPLIT_IN_FP8 = 2e-1
# A tensor that is smaller than this part of the global gradient norm is rounding noise: its error is relative to the
# norm.
NEGLIGIBLE = 1e-6

Named = dict[str, Tensor]


def bound_of(config: Config) -> float:
    """The largest error that the proof allows, relative to the reference."""
    bound = max(BOUNDS[config.precision], config.strategy.lossy_bound())
    shares_sequences = config.strategy.mesh_axes().get("cp", 1) != 1
    return max(bound, SPLIT_IN_FP8) if config.precision is Precision.fp8 and shares_sequences else bound


class CannotBeJudged(Exception):
    """The proof can say neither "equal" nor "differs"; the message is a sentence that says why. Raise it on every rank,
    so that the world can go on with the next job."""


@dataclass
class Evidence:
    """Full (unsharded) tensors on the CPU, by column and then by name."""

    loss: Named
    gradients: Named
    grad_norm: Named
    sgd_weights: Named
    adamw_loss: Named
    evaluate: Named
    routing: Named
    router_bias: Named
    replicas: Named  # already errors: see replicas.py


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


def compare(
    found: Evidence, reference: Evidence, bound: float, differs: Mapping[str, str] = MappingProxyType({})
) -> list[Verdict]:
    """The largest error of every column that either side has. `differs`: the reasons of the strategy, by column."""
    norm = float(reference.grad_norm["norm"])
    verdicts = []
    for field in dataclasses.fields(Evidence):
        of_found, of_reference = getattr(found, field.name), getattr(reference, field.name)
        if field.name == "replicas":
            name, error = max(of_found.items(), key=lambda item: float(item[1]))
            verdicts.append(Verdict(field.name, name, float(error), 0.0))
        elif of_found or of_reference:
            of_gradients = field.name in ("gradients", "sgd_weights")
            verdicts.append(worst(field.name, of_found, of_reference, norm if of_gradients else 0.0, bound))
    return [dataclasses.replace(verdict, differs=differs.get(verdict.column, "")) for verdict in verdicts]


def worst(column: str, found: Named, reference: Named, norm: float, bound: float) -> Verdict:
    """The tensor with the largest error, relative to its bound. Counts must be equal: the bound of integers is 0.
    `norm`: the global gradient norm, relative to which very small gradients and weights are judged; else 0."""
    if missing := found.keys() ^ reference.keys():
        return Verdict(column, f"{min(missing)} is only on one side", float("inf"), bound)
    verdicts = []
    for name, b in reference.items():
        a = found[name].double()
        if a.shape != b.shape:
            return Verdict(column, f"{name} has shape {tuple(a.shape)}, not {tuple(b.shape)}", float("inf"), bound)
        scale = float(b.abs().max())
        apart = float((a - b.double()).abs().max())
        divisor = scale if scale > NEGLIGIBLE * norm else norm
        error = apart / divisor if divisor else 0.0 if apart == 0 else float("inf")
        exact = not b.is_floating_point()
        verdicts.append(Verdict(column, name, float("inf") if error != error else error, 0.0 if exact else bound))
    return max(verdicts, key=lambda verdict: (not verdict.equal, verdict.error))
