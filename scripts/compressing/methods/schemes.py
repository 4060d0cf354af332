"""Quantisation by torchao and bitsandbytes: whole numbers of 8 or 4 bits with scales, instead of float32.

    int8_weight_only    8 bits, a scale for each row
    int8_dynamic        the same, and the inputs of a layer are rounded to 8 bits, with a scale for each token
    int4_weight_only    4 bits, a scale for each 32 columns
    8da4w               the same, and the inputs of a layer are rounded to 8 bits, with a scale and zero for each token
    llm_int8            bitsandbytes: 8 bits, except inputs above 6 (Dettmers et al. 2022, LLM.int8)
    nf4                 bitsandbytes: 4 bits at the quantiles of a normal distribution, a scale for each 32 columns
                        (Dettmers et al. 2023, QLoRA, with 64: then bitsandbytes 0.50 reads rows wrongly on a CPU whose
                        columns are no multiple of it)

A scheme changes the layers of a model in place. What it keeps of a layer is stored as packed.py says, and put back into
a layer to which the scheme has been applied. torchao keeps a 4-bit weight in a byte in memory; only the file packs two.
Attributes of torchao's and bitsandbytes' tensors are used only here (tried with torchao 0.18 and bitsandbytes 0.50).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scripts.compressing.methods.layers import linear_layers
from scripts.compressing.packed import CODES, SCALES, one_in_a_byte, two_in_a_byte
from train.config.problems import EXIT_ENVIRONMENT, BadInput, Problem
from train.model.transformer import Transformer
from train.ranks.quiet import quiet_torchao

GROUP = 32  # columns that share a scale, where weights have 4 bits
LARGE_INPUT = 6.0  # llm_int8 multiplies the columns with a larger input in float16
Parts = dict[str, Tensor]  # by the suffixes of packed.py


@dataclass(frozen=True)
class Scheme:
    """`apply`: changes the layers of these names. `parts`: what is stored of a layer. `restore`: puts it back.
    `dense`: the weight [O, I] that the layer computes with, in float32. `columns`: what the columns are a multiple
    of."""

    package: str
    columns: int
    apply: Callable[[Transformer, Iterable[str]], None]
    parts: Callable[[Any], Parts]
    restore: Callable[[Any, Parts], None]
    dense: Callable[[Any], Tensor]

    def check(self, method: str) -> None:
        """Raise BadInput (exit code 3) if the package is not installed."""
        if importlib.util.find_spec(self.package) is None:
            fix = 'pip install "strategy-lab[compress]"'
            message = f"method={method} needs {self.package}, which is not installed"
            raise BadInput(Problem("extra", message, fix, exit_code=EXIT_ENVIRONMENT))
        quiet_torchao("bitsandbytes")  # which warns at every product that its method is inexact


def torchao_config(method: str) -> Any:
    """torchao's config of a method; train.qat=8da4w simulates the one with the same name."""
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        MappingType,
        PerGroup,
    )

    if method == "int8_weight_only":
        return Int8WeightOnlyConfig(set_inductor_config=False)
    if method == "int8_dynamic":
        return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    types: Any = torch  # its stubs do not have int4
    # the largest weight of a group is on a step; by SYMMETRIC it is between two, where the last bit decides
    mapping, groups = MappingType.SYMMETRIC_NO_CLIPPING_ERR, PerGroup(GROUP)
    if method == "int4_weight_only":
        return IntxWeightOnlyConfig(weight_dtype=types.int4, granularity=groups, mapping_type=mapping)
    return Int8DynamicActivationIntxWeightConfig(
        weight_dtype=types.int4, weight_granularity=groups, weight_mapping_type=mapping
    )


def _torchao(method: str) -> Scheme:
    four_bits = method in ("int4_weight_only", "8da4w")

    def apply(model: Transformer, names: Iterable[str]) -> None:
        from torchao.quantization import quantize_

        chosen = {name.removesuffix(".weight") for name in names}
        quantize_(model, torchao_config(method), filter_fn=lambda _, name: name in chosen)

    def parts(layer: Any) -> Parts:
        weight: Any = layer.weight
        zeros = weight.zero_point
        assert zeros is None or not zeros.any(), "these schemes are symmetric"
        codes = two_in_a_byte(weight.qdata) if four_bits else weight.qdata
        return {CODES: codes, SCALES: weight.scale.float()}

    def restore(layer: Any, parts: Parts) -> None:
        weight: Any = layer.weight
        _copy(weight.qdata, one_in_a_byte(parts[CODES]) if four_bits else parts[CODES])
        _copy(weight.scale, parts[SCALES])

    return Scheme("torchao", GROUP if four_bits else 1, apply, parts, restore, lambda layer: layer.weight.dequantize())


def _replaced(model: Transformer, names: Iterable[str], make: Callable[[nn.Linear], nn.Module]) -> None:
    """Put another module in the place of each layer of these names, on the same device."""
    layers = linear_layers(model)
    for name in names:
        path, _, leaf = name.removesuffix(".weight").rpartition(".")
        setattr(model.get_submodule(path), leaf, make(layers[name]).eval().requires_grad_(False))


def _nf4() -> Scheme:
    def apply(model: Transformer, names: Iterable[str]) -> None:
        from bitsandbytes.nn import Linear4bit, Params4bit

        def small(layer: nn.Linear) -> nn.Module:
            sizes = (layer.in_features, layer.out_features)
            new = Linear4bit(*sizes, bias=False, compress_statistics=False, quant_type="nf4", device="meta")
            made: Any = Params4bit(
                layer.weight.data, compress_statistics=False, quant_type="nf4", blocksize=GROUP, module=new
            )
            new.weight = made.to(layer.weight.device)
            # a kernel that rounds to bf16 and puts the codes into another order
            new.support_avx512bf16_for_cpu = False
            return new

        _replaced(model, names, small)

    def parts(layer: Any) -> Parts:
        return {CODES: layer.weight.data.flatten(), SCALES: layer.weight.quant_state.absmax.float()}

    def restore(layer: Any, parts: Parts) -> None:
        _copy(layer.weight.data.view(-1), parts[CODES])
        _copy(layer.weight.quant_state.absmax, parts[SCALES])

    def dense(layer: Any) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()

    return Scheme("bitsandbytes", GROUP, apply, parts, restore, dense)


def _llm_int8() -> Scheme:
    def apply(model: Transformer, names: Iterable[str]) -> None:
        from bitsandbytes.nn import Int8Params, Linear8bitLt

        def small(layer: nn.Linear) -> nn.Module:
            sizes, device = (layer.in_features, layer.out_features), layer.weight.device
            new = Linear8bitLt(*sizes, bias=False, has_fp16_weights=False, threshold=LARGE_INPUT, device="meta")
            # it is quantised on its way from the host
            made: Any = Int8Params(layer.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
            new.weight = made.to(device)
            return new

        _replaced(model, names, small)

    def numbers(layer: Any) -> tuple[Tensor, Tensor]:
        """The codes and the largest value of each row, which its first forward moves elsewhere."""
        at: Any = layer.weight if layer.weight.CB is not None else layer.state
        return at.CB, at.SCB

    def parts(layer: Any) -> Parts:
        codes, largest = numbers(layer)
        return {CODES: codes, SCALES: largest.float()}

    def restore(layer: Any, parts: Parts) -> None:
        codes, largest = numbers(layer)
        _copy(codes, parts[CODES])
        _copy(largest, parts[SCALES])

    def dense(layer: Any) -> Tensor:
        codes, largest = numbers(layer)
        return codes.float() * (largest.float() / 127).unsqueeze(1)

    return Scheme("bitsandbytes", 1, apply, parts, restore, dense)


def _copy(to: Tensor, value: Tensor) -> None:
    """Raises ValueError if the value has another shape or type."""
    if to.shape != value.shape or to.dtype != value.dtype:
        wanted, found = (f"{x.dtype} {list(x.shape)}" for x in (to, value))
        raise ValueError(f"{found} is no {wanted}")
    to.copy_(value)


SCHEMES = {
    **{method: _torchao(method) for method in ("int8_weight_only", "int8_dynamic", "int4_weight_only", "8da4w")},
    "llm_int8": _llm_int8(),
    "nf4": _nf4(),
}
