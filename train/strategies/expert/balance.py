"""The load of the experts over a whole optimiser step. It is logged, and the routers' biases balance it.

Routers count their own tokens (`moe.Router.note`). Here one small tensor per step sums the counts over all ranks with
other tokens, and over the stages. There is no sum over `tp`, whose ranks route the same tokens, and none over `ep`,
whose ranks are those of the data axes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from train.config.schema import Config
from train.config.strategy import BATCH_AXES
from train.model.moe import routers
from train.model.transformer import Transformer
from train.ranks.distributed import sum_over

TOKEN_AXES = (*BATCH_AXES, "cp")  # ranks that differ on one of these axes route other tokens


class LoadBalance:
    """`routers`: those of this rank, by layer. A dense model has none, and nothing is sent."""

    def __init__(self, model: Transformer, mesh: DeviceMesh, config: Config) -> None:
        self.routers, self.mesh, self.model = routers(model.layers), mesh, config.model
        self.num_sequences = config.train.global_batch_size
        self.num_tokens = config.train.global_batch_size * config.train.seq_len

    @torch.no_grad()
    def update(self) -> dict[str, Tensor]:
        """Update the biases by the step's loads, and reset the counts. Returns scalars, the same on every rank:

        `moe/max_load_ratio`: the tokens of the expert with the most, divided by the mean; the largest over layers.
        `moe/router_entropy`: the entropy of a token's normalised scores, nats; the mean over tokens and layers.
        `moe/aux_loss`: the auxiliary loss before its coefficient, 1 when balanced; the mean over sequences and layers.

        Collective over the token axes and `pp`: L x (E + 2) numbers.
        """
        if self.model.num_experts == 0:
            return {}
        totals = self._totals()
        num_chosen_LE, (aux_L, entropy_L) = totals[:, :-2], totals[:, -2:].unbind(1)
        mean_L = num_chosen_LE.sum(1) / self.model.num_experts
        for layer, router in self.routers.items():
            if router.bias is not None:
                # float64 is exact for these counts, so the sign does not depend on the order of the sum
                missing_E = mean_L[layer] - num_chosen_LE[layer]
                router.bias += self.model.bias_update_rate * missing_E.sign().to(router.bias.dtype)
        self.reset()
        return {
            "moe/max_load_ratio": (num_chosen_LE.amax(1) / mean_L).max(),
            "moe/router_entropy": entropy_L.mean() / self.num_tokens,
            "moe/aux_loss": aux_L.mean() / self.num_sequences,
        }

    def reset(self) -> None:
        """Set the counts of this step to zero."""
        for router in self.routers.values():
            router.num_chosen.zero_()
            router.sums.zero_()

    def _totals(self) -> Tensor:
        """[layers of the whole model, E + 2]: tokens by expert, the sum of auxiliary losses, the sum of entropies."""
        device = next(iter(self.routers.values())).sums.device
        totals = torch.zeros(self.model.num_layers, self.model.num_experts + 2, dtype=torch.float64, device=device)
        for layer, router in self.routers.items():
            totals[layer] = torch.cat((router.num_chosen.double(), router.sums.double()))
        return sum_over(totals, self.mesh, "pp", *TOKEN_AXES)
