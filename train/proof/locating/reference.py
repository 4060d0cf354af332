"""One device's step as the localisation uses it: whole tensors, how far rounding alone moves them, and the terms of
which sums over ranks consist."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from train.config.fields import IGNORE_INDEX
from train.config.schema import Balance, Config
from train.model.moe import MixtureOfExperts
from train.model.transformer import dtypes, feed_forward, rope_table, rotate
from train.model.weights import initial_value, materialise
from train.proof.locating.layout import whole_shape
from train.proof.locating.trace import Trace

# How many times the difference between two runs of one device, of which one starts from inputs that are moved by one
# unit of the last place, a strategy may differ from one device. tests/test_locating.py holds right strategies to it.
SLACK = 32.0
WIDTH = -1  # the dimension of features
READERS = ("wq", "wk", "wv", "gate", "up", "head")  # linear modules that read what a norm gives
Terms = dict[str, list[Tensor]]  # by axis: the term of every rank


@dataclass(frozen=True)
class Reference:
    """`trace` is that of one device, `moved` that of one device with moved inputs. `first`: whether it is the first
    step, in which the weights have their initial values. `slack`: how much further off than moved inputs a strategy may
    be. `lossy`: how far off gradients may be, in the steps before, because they are sent with less precision."""

    trace: Trace
    moved: Trace
    config: Config
    first: bool = True
    slack: float = SLACK
    lossy: float = 0.0

    @cached_property
    def order(self) -> list[str]:
        """The names in forward order."""
        return self.trace.order

    @cached_property
    def forward(self) -> dict[str, Tensor]:
        """The whole tensors of the global batch, by name."""
        return self._whole(self.trace.forward)

    @cached_property
    def backward(self) -> dict[str, Tensor]:
        return self._whole(self.trace.backward)

    def wholes(self, side: str) -> dict[str, Tensor]:
        """Those of "forward" or of "backward"."""
        return self.forward if side == "forward" else self.backward

    @property
    def unit(self) -> float:
        """One unit in the last place of the dtype of the computation, for a number of 1."""
        return torch.finfo(dtypes(self.config.precision)["compute_dtype"]).eps

    @cached_property
    def scales(self) -> dict[tuple[str, str], float]:
        """What rounding explains of an error, relative to the largest number, by ("forward" or "backward", name)."""
        found = {}
        for side, moved in (("forward", self.moved.forward), ("backward", self.moved.backward)):
            others = self._whole(moved)
            for name, whole in self.wholes(side).items():
                largest = float(whole.double().abs().max())
                apart = float((whole.double() - others[name].double()).abs().max())
                least, lossy = (self.unit, self.lossy) if whole.is_floating_point() else (0.0, 0.0)
                rounding = self.slack * max(apart / largest if largest > 0 else 0.0, least)
                found[side, name] = max(rounding, SLACK * lossy)
        return found

    def _whole(self, recorded: dict[tuple[str, int], Tensor]) -> dict[str, Tensor]:
        tokens, names = self.config.train.seq_len, dict.fromkeys(name for name, _ in recorded)
        wholes = {}
        for name in names:
            pieces = [value for (of, _), value in sorted(recorded.items()) if of == name]
            shaped = [whole_shape(name, piece, tokens) for piece in pieces]
            wholes[name] = torch.stack(shaped) if shaped[0].ndim == 0 else torch.cat(shaped)
        return wholes

    def weight(self, name: str) -> Tensor:
        """The initial value of the weight of the linear module with this name, in the dtype of the computation."""
        dtype = dtypes(self.config.precision)["compute_dtype"]
        like = self.forward[self.input_of(name)]
        shape = torch.Size((self.forward[name].shape[-1], self.input_features(name, like).shape[-1]))
        return initial_value(f"{name}.weight", shape, self.config.model, self.config.train.seed).to(dtype)

    def embedding(self) -> Tensor:
        """The initial table, in the dtype in which it is stored."""
        shape = torch.Size((self.config.model.vocab_size, self.config.model.dim))
        table = initial_value("embed.weight", shape, self.config.model, self.config.train.seed)
        return table.to(self.forward["embed"].dtype)

    def input_of(self, name: str) -> str:
        """The name of what goes into a linear module."""
        prefix, _, leaf = name.rpartition(".")
        if name == "head":
            return "norm"
        if leaf == "wo":
            return f"{prefix}.kernel"
        layer = ".".join(name.split(".")[:2])
        return f"{layer}.attention_norm" if ".attention." in name else f"{layer}.feed_forward_norm"

    def input_features(self, name: str, value: Tensor) -> Tensor:
        """The input BTI of a linear module, from the value of `input_of`."""
        prefix, _, leaf = name.rpartition(".")
        if leaf == "wo":
            return value.transpose(1, 2).flatten(2)
        if leaf == "down":
            return F.silu(self.forward[f"{prefix}.gate"]) * self.forward[f"{prefix}.up"]
        return value

    def forward_terms(self, name: str, degrees: dict[str, int]) -> Terms:
        """The terms that the ranks of `tp` add up: products over a part of the input features, and rows of the
        embedding. Empty for modules without such a sum."""
        n, leaf = degrees["tp"], name.rpartition(".")[2]
        if not self.first or n == 1 or leaf not in ("wo", "down", "embed"):
            return {}
        if leaf == "embed":
            tokens, width = self.forward["embed:tokens"], -(-self.config.model.vocab_size // n)
            owner = (tokens // width).unsqueeze(-1)
            return {"tp": [self.forward["embed"] * (owner == rank) for rank in range(n)]}
        x, weight = self.input_features(name, self.forward[self.input_of(name)]), self.weight(name)
        parts = zip(x.chunk(n, WIDTH), weight.chunk(n, WIDTH), strict=True)
        return {"tp": [F.linear(part, columns) for part, columns in parts]}

    def backward_terms(self, name: str, degrees: dict[str, int]) -> Terms:
        """The terms of the gradient of a norm's output that the ranks of `tp` add up: each from its part of the linear
        modules that use it. Empty for other modules."""
        n = degrees["tp"]
        readers = [one for one in self.linears() if one.rpartition(".")[2] in READERS and self.input_of(one) == name]
        if not self.first or n == 1 or not readers:
            return {}
        totals = []
        for rank in range(n):
            terms = []
            for reader in readers:
                grads, weight = self.backward[reader], self.weight(reader)
                share = max(1, n // self.config.model.num_kv_heads) if reader.endswith((".wk", ".wv")) else 1
                columns = grads.chunk(n // share, WIDTH)[rank // share], weight.chunk(n // share)[rank // share]
                terms.append(columns[0] @ columns[1] / share)
            totals.append(torch.stack(terms).sum(0))
        return {"tp": totals}

    def with_old_weights(self, name: str) -> Tensor | None:
        """What a linear module would give with the initial weights; None for other modules, and in the first step."""
        if self.first or name.rpartition(".")[2] not in (*READERS, "wo", "down"):
            return None
        return F.linear(self.input_features(name, self.forward[self.input_of(name)]), self.weight(name))

    def mixture(self, layer: str) -> MixtureOfExperts:
        """The mixture of a layer with its initial weights, on the CPU."""
        model, dtype = self.config.model, dtypes(self.config.precision)["param_dtype"]
        with torch.device("meta"):
            mixture = feed_forward(model).to(dtype)
        materialise(mixture, f"{layer}.feed_forward.", model, seed=self.config.train.seed, device=torch.device("cpu"))
        assert isinstance(mixture, MixtureOfExperts)
        mixture.router.aux_scale = 1 / self.config.train.global_batch_size
        return mixture

    def mixture_gradients(self, layer: str, index: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """What some tokens add to the gradients of a mixture's parameters in the first step, by global name. `index`:
        their rows and positions."""
        mixture = self.mixture(layer)
        x = self.forward[f"{layer}.feed_forward_norm"][index]
        mixture(x).backward(self.backward[f"{layer}.feed_forward"][index])
        prefix = f"{layer}.feed_forward."
        return {prefix + name: p.grad.double() for name, p in mixture.named_parameters() if p.grad is not None}

    def auxiliary(self, name: str) -> Tensor | None:
        """The part of a gradient that comes from the auxiliary loss of a mixture, in the first step; None if there is
        none. `name`: of the norm before the mixture."""
        model, layer = self.config.model, name.removesuffix(".feed_forward_norm")
        if not self.first or name == layer or model.num_experts == 0 or model.balance is not Balance.aux_loss:
            return None
        x = self.forward[name].clone().requires_grad_()
        (self.mixture(layer).router(x)[0] * 0).sum().backward()
        return x.grad

    def linears(self) -> list[str]:
        leaves = (*READERS, "wo", "down")
        return [name for name in self.order if name.rpartition(".")[2] in leaves and name in self.backward]

    def rotated(self, name: str, position: int) -> Tensor:
        """What would go into the kernel if every token had this position. `name`: that of `…kernel:q` or `:k`."""
        layer, _, which = name.rpartition(".kernel:")
        x = self.forward[f"{layer}.w{which}"]
        model, head_dim = self.config.model, self.config.model.dim // self.config.model.num_heads
        rope = rope_table(model.max_seq_len, head_dim, model.rope_theta).to(torch.promote_types(x.dtype, torch.float32))
        heads = x.unflatten(-1, (-1, head_dim))
        return rotate(heads, rope[:, position : position + 1].expand(-1, x.shape[1], -1)).transpose(1, 2)

    def attention(self, name: str, masked: Tensor) -> Tensor:
        """What the kernel with this name would give if `masked` [T, T] said which keys (columns) each query sees not.
        The result is whole: BHTE."""
        q, k, v = (self.forward[f"{name}:{which}"] for which in "qkv")
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = (q @ k.transpose(-1, -2)).double() / math.sqrt(q.shape[-1])
        return scores.masked_fill(masked, -math.inf).softmax(-1).nan_to_num(0.0).to(v.dtype) @ v

    @cached_property
    def token_losses(self) -> Tensor:
        """[B, T]: the loss of every token, 0 where the target has none."""
        logits, targets = self.forward["head"].double(), self.forward["loss:targets"]
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
        return losses.view(targets.shape)
