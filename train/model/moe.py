"""A mixture-of-experts feed-forward that knows nothing about ranks: a router, experts, and a dispatch between them.

Shapes: B batch, T sequence, D width, E experts, K experts per token, N = B x T tokens, F expert width.
Experts have no capacity limit: every token reaches all K of its experts, and no token is dropped or padded.
Strategies rely on these properties:
- Experts' weights are 3-D with the expert first, so that splitting experts, columns or rows changes no attribute.
- The dispatch is a submodule that can be replaced. It gives the experts rows that are sorted by expert, and the number
  of rows of each expert.
- A router updates its statistics in the backward, which runs once per training forward, also if the forward is
  recomputed, and never in an evaluation. `train/strategies/expert/balance.py` sums them over ranks, once per step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train.config.schema import Balance, ModelConfig, ScoreFunction
from train.model.numerics import upcast


class _Observe(torch.autograd.Function):
    """The identity on the scores. Its backward gives `loss` the gradient `scale`, so that the auxiliary loss needs no
    path to the model's output (as in Megatron-LM), and passes `seen` to `Router.note`."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, loss: Tensor, router: Router, scale: float, *seen: Tensor) -> Any:
        ctx.router, ctx.scale = router, scale
        ctx.save_for_backward(loss, *seen)
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        loss, *seen = ctx.saved_tensors
        ctx.router.note(loss, *seen)
        return grad, torch.full_like(loss, ctx.scale), None, None, *(None for _ in seen)


class Router(nn.Module):
    """Scores every expert for every token, and chooses the K experts with the highest scores.

    A chosen expert's gate is its score divided by the sum of the K scores (Mixtral: softmax; DeepSeek-V3: sigmoid).
    With one expert per token the gate is the score itself (Switch): the quotient would be 1 and have no gradient.

    `aux_loss` (Shazeer et al. 2017, GShard, Switch; per sequence as in DeepSeek-V3) is the sum over experts of f x P,
    where f is E times the expert's share of the sequence's choices, and P is its mean normalised score. It is 1 when
    the load is balanced.
    `bias` (Wang et al. 2024) is a bias per expert, which affects the choice but not the gate. Each optimiser step moves
    it by `bias_update_rate` towards the mean load.
    """

    weight: Tensor
    bias: Tensor | None
    num_chosen: Tensor
    sums: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k, self.score_function = config.top_k, config.score_function
        self.coefficient = config.aux_loss_coef if config.balance is Balance.aux_loss else 0.0
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.dim))
        self.register_buffer("bias", torch.empty(config.num_experts) if config.balance is Balance.bias else None)
        # counted since the last optimiser step: tokens by expert; the sums of auxiliary losses and of tokens' entropies
        self.register_buffer("num_chosen", torch.empty(config.num_experts, dtype=torch.long), persistent=False)
        self.register_buffer("sums", torch.empty(2), persistent=False)
        self.aux_scale = 1.0  # the weight of a sequence's auxiliary loss; a strategy knows the number of sequences
        self.sequence_shards = 1  # the number of ranks that share each sequence
        self.sum_over_sequence: Callable[[Tensor], Tensor] = _identity  # the sum over these ranks
        # called in each forward with (what experts are ranked by BTE, chosen BTK); it returns the experts to use, BTK
        self.on_choice: Callable[[Tensor, Tensor], Tensor] | None = None

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """The gates and the numbers of the chosen experts, both BTK; gates are in float32 or float64."""
        return self.choose(x_BTD, self.weight)

    def choose(self, x_BTD: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        # The weight is rounded to x's dtype first, as all weights are, so that its value does not depend on how it was
        # gathered.
        logits_BTE = F.linear(upcast(x_BTD), upcast(weight.to(x_BTD.dtype)))
        softmax = self.score_function is ScoreFunction.softmax
        scores_BTE = logits_BTE.softmax(-1) if softmax else logits_BTE.sigmoid()
        ranked_BTE = scores_BTE.detach() if self.bias is None else scores_BTE.detach() + self.bias
        chosen_BTK = ranked_BTE.topk(self.top_k, dim=-1).indices
        if self.on_choice is not None:
            chosen_BTK = self.on_choice(ranked_BTE, chosen_BTK)
        if torch.is_grad_enabled():
            scores_BTE = self.observed(scores_BTE, chosen_BTK)
        gates_BTK = scores_BTE.gather(-1, chosen_BTK)
        return gates_BTK if self.top_k == 1 else gates_BTK / gates_BTK.sum(-1, keepdim=True), chosen_BTK

    @torch.compiler.disable  # a compiled backward cannot update a module's buffers
    def observed(self, scores_BTE: Tensor, chosen_BTK: Tensor) -> Tensor:
        """The scores; their backward also computes the auxiliary loss's gradient and updates the statistics."""
        num_experts = scores_BTE.shape[-1]
        length = scores_BTE.shape[1] * self.sequence_shards
        probability_BTE = scores_BTE / scores_BTE.sum(-1, keepdim=True)
        num_chosen_BE = torch.zeros_like(scores_BTE).scatter(-1, chosen_BTK, 1.0).sum(1).detach()
        load_BE = self.sum_over_sequence(num_chosen_BE) * (num_experts / (self.top_k * length))
        # The loads are those of the whole sequence, so on a shard of it this is one term of the sum over shards.
        aux = (load_BE * probability_BTE.sum(1) / length).sum()
        entropy = torch.special.entr(probability_BTE.detach()).sum()
        scale = self.coefficient * self.aux_scale
        num_chosen_E = num_chosen_BE.sum(0).long()
        return _Observe.apply(scores_BTE, aux if scale else aux.detach(), self, scale, num_chosen_E, entropy)

    def note(self, aux: Tensor, num_chosen_E: Tensor, entropy: Tensor) -> None:
        self.num_chosen += num_chosen_E
        self.sums += torch.stack((aux, entropy)).to(self.sums.dtype)


def _identity(x: Tensor) -> Tensor:
    return x


class Experts(nn.Module):
    """E SwiGLU feed-forwards on rows that are sorted by expert: (rows ND, number of rows of each expert E) -> ND."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.gate = nn.Parameter(torch.empty(config.num_experts, config.expert_ffn_dim, config.dim))
        self.up = nn.Parameter(torch.empty(config.num_experts, config.expert_ffn_dim, config.dim))
        self.down = nn.Parameter(torch.empty(config.num_experts, config.dim, config.expert_ffn_dim))

    def forward(self, x_ND: Tensor, num_rows_E: Tensor) -> Tensor:
        return self.compute(x_ND, num_rows_E, self.gate, self.up, self.down)

    def compute(self, x_ND: Tensor, num_rows_E: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        gate, up, down = (weight.to(x_ND.dtype) for weight in (gate, up, down))
        if _can_group(x_ND, gate):
            ends_E = num_rows_E.cumsum(0, dtype=torch.int32)
            hidden = F.silu(_grouped(x_ND, gate, ends_E)) * _grouped(x_ND, up, ends_E)
            return _grouped(hidden, down, ends_E)
        # The backward of `unbind` is one stack, unlike that of an index per expert. An expert without rows gets a
        # gradient of zeros instead of none.
        parts = zip(x_ND.split(num_rows_E.tolist()), gate.unbind(), up.unbind(), down.unbind(), strict=True)
        return torch.cat([F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), d) for x, g, u, d in parts])


def _can_group(x: Tensor, gate: Tensor) -> bool:
    """Whether the fused kernel runs: it needs bf16 on CUDA, and rows whose size is a multiple of 16 bytes."""
    return x.is_cuda and x.dtype is torch.bfloat16 and gate.shape[1] % 8 == 0 and gate.shape[2] % 8 == 0


def _grouped(x: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    return F.grouped_mm(x, weight_EOI.transpose(-2, -1), offs=ends_E)


class _GatherRows(torch.autograd.Function):
    """Row i of the result is row order[i] // k of x. `inverse` is the inverse permutation: with it the backward adds in
    a fixed order, while the order of an `index_add` depends on timing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x[order // k]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad[inverse].unflatten(0, (-1, ctx.k)).sum(1), None, None, None


def gather_rows(x: Tensor, order: Tensor, inverse: Tensor, k: int = 1) -> Tensor:
    """The rows of x, each k times, in the given order."""
    return _GatherRows.apply(x, order, inverse, k)


def sorted_by_expert(expert: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The order that sorts rows by expert, its inverse, and the number of rows of each expert. The host does not wait
    for the device."""
    ranked, order = expert.flatten().sort(stable=True)
    inverse = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
    ends = torch.searchsorted(ranked, torch.arange(num_experts + 1, device=ranked.device))
    return order, inverse, ends.diff()


class LocalDispatch(nn.Module):
    """A dispatch to experts that are all on this rank: (x ND, chosen NK, experts) -> each token's K results, NKD."""

    def forward(self, x_ND: Tensor, chosen_NK: Tensor, experts: nn.Module) -> Tensor:
        k = chosen_NK.shape[1]
        order, inverse, num_rows_E = sorted_by_expert(chosen_NK, experts.num_experts)  # type: ignore[arg-type]
        y = experts(gather_rows(x_ND, order, inverse, k), num_rows_E)
        return gather_rows(y, inverse, order).unflatten(0, (-1, k))


class MixtureOfExperts(nn.Module):
    """The sum over the K chosen experts of gate x expert(x), plus `shared`(x) for all tokens."""

    def __init__(self, config: ModelConfig, shared: nn.Module | None) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared = shared
        self.dispatch: nn.Module = LocalDispatch()

    def forward(self, x_BTD: Tensor) -> Tensor:
        gates_BTK, chosen_BTK = self.router(x_BTD)
        y_NKD = self.dispatch(x_BTD.flatten(0, 1), chosen_BTK.flatten(0, 1), self.experts)
        y_BTD = (gates_BTK.flatten(0, 1).unsqueeze(1).to(y_NKD.dtype) @ y_NKD).view_as(x_BTD)
        return y_BTD if self.shared is None else y_BTD + self.shared(x_BTD)


def routers(layers: nn.ModuleDict) -> dict[int, Router]:
    """The routers by the number of their layer; empty for a dense model."""
    found = {int(name): getattr(layer, "feed_forward", None) for name, layer in layers.items()}
    return {i: moe.router for i, moe in found.items() if isinstance(moe, MixtureOfExperts)}
