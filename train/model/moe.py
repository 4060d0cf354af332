"""A mixture-of-experts feed-forward that knows nothing of ranks: a router, experts, what carries tokens between them.

Shapes: B batch, T sequence, D width, E experts, K experts per token, N = B x T tokens, F expert width.
Capacity-free: every token reaches all K of its experts, none is dropped or padded.
What strategies rely on:
- Experts' weights are 3-D with the expert first, so that splitting experts, columns or rows changes no attribute.
- The dispatch is a submodule that can be swapped; experts take rows sorted by expert and the number of each.
- A router's statistics are taken in the backward: it runs once per training forward, be it recomputed or not,
  and never in an evaluation. `train/strategies/expert/balance.py` sums them over ranks, once per optimiser step.
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
    """Identity on the scores. In the backward, `scale` is the gradient of `loss`, which so needs no path to the
    model's output (Megatron-LM's way), and the router takes note of what the forward chose. `place`: of this forward
    among the router's; it stays the first forward's when that is recomputed."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, loss: Tensor, router: Router, scale: float, place: int, *seen: Tensor) -> Any:
        ctx.router, ctx.scale, ctx.place = router, scale, place
        ctx.save_for_backward(loss, *seen)
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        loss, *seen = ctx.saved_tensors
        ctx.router.note(ctx.place, loss, *seen)
        return grad, torch.full_like(loss, ctx.scale), None, None, None, *(None for _ in seen)


class Router(nn.Module):
    """Scores every expert for every token, and chooses the K best.

    A chosen expert's gate is its score over the sum of the K scores (Mixtral: softmax; DeepSeek-V3: sigmoid), or, with
    one expert per token, the score itself (Switch), which would else be 1 and teach the router nothing.

    `aux_loss` (Shazeer et al. 2017, GShard, Switch; per sequence as in DeepSeek-V3): sum over experts of f x P, where f
    is the share of the sequence's choices times E, and P the mean score, normalised; 1 when balanced.
    `bias` (Wang et al. 2024): a bias per expert, added for the choice alone, that moves by `bias_update_rate` per
    optimiser step towards the mean load.
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
        # since the last optimiser step: tokens by expert; and two sums, of aux losses and of tokens' entropies
        self.register_buffer("num_chosen", torch.empty(config.num_experts, dtype=torch.long), persistent=False)
        self.register_buffer("sums", torch.empty(2), persistent=False)
        self.aux_scale = 1.0  # of a sequence's aux loss in the loss; a strategy knows the number of sequences
        self.sequence_shards = 1  # ranks that share each sequence,
        self.sum_over_sequence: Callable[[Tensor], Tensor] = _identity  # and the sum over them
        # (place among forwards, chosen BTK, margins BT), per microbatch, in the order of the backwards
        self.on_choice: Callable[[int, Tensor, Tensor], None] | None = None
        self.num_forwards = 0  # while `on_choice` is set

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Gates and experts, both BTK; gates in float32 or above."""
        return self.choose(x_BTD, self.weight)

    def choose(self, x_BTD: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        # rounded like all weights before it is raised: the same value however the weight was gathered
        logits_BTE = F.linear(upcast(x_BTD), upcast(weight.to(x_BTD.dtype)))
        softmax = self.score_function is ScoreFunction.softmax
        scores_BTE = logits_BTE.softmax(-1) if softmax else logits_BTE.sigmoid()
        with torch.no_grad():
            ranked_BTE = scores_BTE if self.bias is None else scores_BTE + self.bias
            chosen_BTK = ranked_BTE.topk(self.top_k, dim=-1).indices
        if torch.is_grad_enabled():
            scores_BTE = self.observed(scores_BTE, ranked_BTE, chosen_BTK)
        gates_BTK = scores_BTE.gather(-1, chosen_BTK)
        return gates_BTK if self.top_k == 1 else gates_BTK / gates_BTK.sum(-1, keepdim=True), chosen_BTK

    def observed(self, scores_BTE: Tensor, ranked_BTE: Tensor, chosen_BTK: Tensor) -> Tensor:
        """The scores, with the auxiliary loss and the statistics hung on to them."""
        num_experts = scores_BTE.shape[-1]
        length = scores_BTE.shape[1] * self.sequence_shards
        probability_BTE = scores_BTE / scores_BTE.sum(-1, keepdim=True)
        num_chosen_BE = torch.zeros_like(scores_BTE).scatter(-1, chosen_BTK, 1.0).sum(1).detach()
        load_BE = self.sum_over_sequence(num_chosen_BE) * (num_experts / (self.top_k * length))
        # of a shard of the sequence, this is its term of a sum over the shards, as the loads are whole
        aux = (load_BE * probability_BTE.sum(1) / length).sum()
        entropy = torch.special.entr(probability_BTE.detach()).sum()
        scale = self.coefficient * self.aux_scale
        seen = [num_chosen_BE.sum(0).long(), entropy]
        if self.on_choice is not None:
            self.num_forwards += 1
            seen += [chosen_BTK.sort(-1).values, self.margin(ranked_BTE)]
        return _Observe.apply(scores_BTE, aux if scale else aux.detach(), self, scale, self.num_forwards, *seen)

    def margin(self, ranked_BTE: Tensor) -> Tensor:
        """By how much each token's last chosen expert beats the next: under rounding, a choice within it is chance."""
        if self.top_k == ranked_BTE.shape[-1]:
            return torch.full_like(ranked_BTE[..., 0], torch.inf)
        best = ranked_BTE.detach().topk(self.top_k + 1, dim=-1).values
        return best[..., -2] - best[..., -1]

    def note(self, place: int, aux: Tensor, num_chosen_E: Tensor, entropy: Tensor, *choice: Tensor) -> None:
        self.num_chosen += num_chosen_E
        self.sums += torch.stack((aux, entropy)).to(self.sums.dtype)
        if choice and self.on_choice is not None:
            self.on_choice(place, *choice)


def _identity(x: Tensor) -> Tensor:
    return x


class Experts(nn.Module):
    """E feed-forwards, SwiGLU each, on rows sorted by expert: (rows ND, number of rows by expert E) -> ND."""

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
        # unbind, not an index per expert: its backward is one stack; an expert without rows gets zeros, not nothing
        parts = zip(x_ND.split(num_rows_E.tolist()), gate.unbind(), up.unbind(), down.unbind(), strict=True)
        return torch.cat([F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), d) for x, g, u, d in parts])


def _can_group(x: Tensor, gate: Tensor) -> bool:
    """The fused kernel takes bf16 on CUDA, with rows of 16 bytes' multiples."""
    return x.is_cuda and x.dtype is torch.bfloat16 and gate.shape[1] % 8 == 0 and gate.shape[2] % 8 == 0


def _grouped(x: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    return F.grouped_mm(x, weight_EOI.transpose(-2, -1), offs=ends_E)


class _GatherRows(torch.autograd.Function):
    """Row i is row order[i] // k of x; `inverse` is the inverse permutation, so the backward adds nothing by chance
    of timing, as an index_add would."""

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
    """x's rows, k times each, in the given order."""
    return _GatherRows.apply(x, order, inverse, k)


def sorted_by_expert(expert: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The order that sorts rows by expert, its inverse, and the number of rows by expert. No device waits."""
    ranked, order = expert.flatten().sort(stable=True)
    inverse = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
    ends = torch.searchsorted(ranked, torch.arange(num_experts + 1, device=ranked.device))
    return order, inverse, ends.diff()


class LocalDispatch(nn.Module):
    """All experts are here: (x ND, chosen NK, experts) -> each token's K results, NKD."""

    def forward(self, x_ND: Tensor, chosen_NK: Tensor, experts: nn.Module) -> Tensor:
        k = chosen_NK.shape[1]
        order, inverse, num_rows_E = sorted_by_expert(chosen_NK, experts.num_experts)  # type: ignore[arg-type]
        y = experts(gather_rows(x_ND, order, inverse, k), num_rows_E)
        return gather_rows(y, inverse, order).unflatten(0, (-1, k))


class MixtureOfExperts(nn.Module):
    """sum over the K chosen experts of gate x expert(x), plus `shared`(x) for all tokens."""

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
    """By the layer's number; empty for a dense model."""
    found = {int(name): getattr(layer, "feed_forward", None) for name, layer in layers.items()}
    return {i: moe.router for i, moe in found.items() if isinstance(moe, MixtureOfExperts)}
