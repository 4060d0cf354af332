"""Keys and values that are kept, so that a new token costs the work of one token and not that of its whole context.

Shapes: L layers, B batch, T new tokens, S slots, H query heads, K key-value heads, G = H / K, E head width,
V vocabulary.
RoPE turns keys before they reach the attention kernel, so that a kept key never changes.
- `CachedModel` is for decoding in Python: it fills its slots in place, and reads only those that are filled.
- `DecodeStep` is for graphs that are exported: no shape depends on how much is filled, nothing is written in place, and
  it consists of plain products. It reads the slots that it is given, and the caller writes the new keys and values.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train.model.numerics import upcast
from train.model.transformer import Transformer


def with_kernels(model: Transformer, kernel_of: Callable[[int], nn.Module]) -> Transformer:
    """The model with other attention kernels: `kernel_of` gives that of a layer, counted from 0.

    The result has the parameters of `model` and copies of the modules around the kernels, so that `model` stays as it
    is and both can be used in turns. Make it when no module of `model` will be replaced any more.
    """
    layers = {}
    for number, (name, layer) in enumerate(model.layers.items()):
        attention = _replaced(layer.attention, kernel=kernel_of(number))  # type: ignore[arg-type]
        layers[name] = _replaced(layer, attention=attention)
    view = _replaced(model, layers=nn.ModuleDict(layers))
    assert isinstance(view, Transformer)
    return view


def _replaced(module: nn.Module, **children: nn.Module | None) -> nn.Module:
    """A copy of the module that shares everything with it but these children."""
    result = copy.copy(module)
    result._modules = {**module._modules, **children}
    return result


def empty_slots(model: Transformer, batch: int, slots: int) -> tuple[Tensor, Tensor]:
    """Slots for keys and for values, [L, B, K, S, E] each, full of zeros: what is masked must still be a number."""
    config = model.config
    shape = (config.num_layers, batch, config.num_kv_heads, slots, config.dim // config.num_heads)
    one, other = (torch.zeros(shape, dtype=model.compute_dtype, device=model.rope.device) for _ in range(2))
    return one, other


class CachedModel:
    """A model that remembers the tokens that it has read. `filled`: how many each row of the batch has, with padding.

    Raises ValueError for more slots than the model has positions.
    """

    def __init__(self, model: Transformer, batch: int = 1, slots: int | None = None) -> None:
        most = model.config.max_seq_len
        self.slots = most if slots is None else slots
        if not 0 < self.slots <= most:
            raise ValueError(f"slots={self.slots} is not a number from 1 to model.max_seq_len={most}")
        self.keys, self.values = empty_slots(model, batch, self.slots)
        self.head = model.head
        self.body = _replaced(with_kernels(model, lambda layer: _FillingKernel(self, layer)), head=None)
        self.start()

    def start(self, padding: Sequence[int] | None = None) -> None:
        """Forget everything. `padding`: how many tokens at the left of each row are none, so that prompts of several
        lengths end together. RoPE is relative, so a row's logits are those of the row without its padding."""
        self.filled = 0
        padded = padding is not None and any(padding)
        self.padding_B = torch.tensor(padding, device=self.keys.device) if padded else None
        self.mask: Tensor | None = None

    @torch.no_grad()
    def __call__(self, tokens_BT: Tensor, *, last: bool = False) -> Tensor:
        """The logits BTV after each of the next tokens, or B1V after the last one. Raises ValueError if there are not
        enough slots."""
        count = tokens_BT.shape[1]
        if self.filled + count > self.slots:
            raise ValueError(f"{self.filled} of {self.slots} slots are filled, and {count} more tokens have no room")
        positions_T = torch.arange(self.filled, self.filled + count, device=tokens_BT.device)
        self.mask = self._mask(positions_T)
        hidden_BTD = self.body(tokens_BT, positions_T)
        self.filled += count
        hidden_BTD = hidden_BTD[:, -1:] if last else hidden_BTD
        return hidden_BTD if self.head is None else self.head(hidden_BTD)

    def _mask(self, positions_T: Tensor) -> Tensor | None:
        """Which slots each new token sees, [B, 1, T, S']; None where `attend` needs no mask."""
        if self.padding_B is None and (self.filled == 0 or len(positions_T) == 1):
            return None
        slots_S = torch.arange(self.filled + len(positions_T), device=positions_T.device)
        seen = slots_S <= positions_T[:, None]
        if self.padding_B is None:
            return seen[None, None]
        # Padding sees padding, as a row of the softmax without any slot would be no number.
        padding_B11 = self.padding_B[:, None, None]
        return (seen & ((slots_S >= padding_B11) | (positions_T[:, None] < padding_B11)))[:, None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        end = self.filled + q.shape[2]
        keys, values = self.keys[layer][:, :, :end], self.values[layer][:, :, :end]
        keys[:, :, self.filled :] = k
        values[:, :, self.filled :] = v
        causal = self.mask is None and self.filled == 0
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=self.mask, is_causal=causal, enable_gqa=gqa)


class _FillingKernel(nn.Module):
    def __init__(self, cached: CachedModel, layer: int) -> None:
        super().__init__()
        self.cached, self.layer = cached, layer

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.cached.attend(self.layer, q, k, v)


def decode_step(model: Transformer) -> DecodeStep:
    """The model as one step of decoding, for `torch.export` and what builds on it. The parameters are those of
    `model`."""
    return DecodeStep(model).eval()


class DecodeStep(nn.Module):
    """(tokens BT, position, keys LBKSE, values LBKSE) -> (logits BTV, keys LBKTE, values LBKTE).

    `position`, an int64 of shape [1], is the number of slots that are filled. The keys and values that it gives are
    those of the new tokens: the caller writes them into the slots from `position` on (`write`) before the next step.
    Slots that are not filled may hold any finite number. A prompt is read with T > 1, or token by token.

    Giving back whole slots instead would copy all of them in each step.
    """

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.kernels = [_ReadingKernel() for _ in model.layers]
        self.model = with_kernels(model, lambda layer: self.kernels[layer])

    def forward(self, tokens_BT: Tensor, position: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        count = tokens_BT.shape[1]
        steps_T = torch.arange(count, device=tokens_BT.device)
        hidden_TS = (torch.arange(keys.shape[3], device=tokens_BT.device) >= position).expand(count, -1)
        hidden = torch.cat((hidden_TS, steps_T > steps_T[:, None]), dim=1)
        for kernel, old_keys, old_values in zip(self.kernels, keys.unbind(), values.unbind(), strict=True):
            kernel.given = old_keys, old_values, hidden
        logits_BTV = self.model(tokens_BT, position + steps_T)
        new_keys, new_values = zip(*(kernel.found for kernel in self.kernels), strict=True)
        return logits_BTV, torch.stack(new_keys), torch.stack(new_values)


def write(slots: Tensor, new: Tensor, position: int) -> None:
    """Put the keys or the values of new tokens, LBKTE, into their slots, LBKSE."""
    slots[:, :, :, position : position + new.shape[3]] = new


class _ReadingKernel(nn.Module):
    """Attention to slots and to new tokens, written out. The two are never joined, so that no slot is copied."""

    given: tuple[Tensor, Tensor, Tensor]  # the keys and values of the slots BKSE, and what is hidden, T x (S + T)
    found: tuple[Tensor, Tensor]  # the keys and values of the new tokens, BKTE

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values, hidden = self.given
        self.found = k, v
        slots, count, groups = keys.shape[2], q.shape[2], q.shape[1] // k.shape[1]
        q = q.unflatten(1, (-1, groups)).flatten(2, 3)  # B, K, G x T, E
        scores = upcast(torch.cat((q @ keys.transpose(-1, -2), q @ k.transpose(-1, -2)), dim=-1))
        scores = scores / math.sqrt(q.shape[-1])
        # A finite number, as some runtimes make no number of the exponential of -inf.
        scores = scores.masked_fill(hidden.repeat(groups, 1), torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1).to(v.dtype)
        out = weights[..., :slots] @ values + weights[..., slots:] @ v
        return out.unflatten(2, (groups, count)).flatten(1, 2)
