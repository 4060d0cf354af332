"""The graph for onnxruntime. `quant=int8`: the weights of all products are 8-bit numbers with a scale for each column,
and what they multiply is rounded to 8 bits as it comes. Embedding and norms stay float32.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path

import torch

from scripts.exporting.running.onnx import INPUTS
from scripts.exporting.writing.graph import Product, exported, with_linears
from train.model.transformer import Transformer

OUTPUTS = ("logits", "new_keys", "new_values")


def write(model: Transformer, quant: str, facts: dict[str, str], file: Path) -> None:
    program = exported(with_linears(model, Product), batched=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's exporter is warned of torch's own functions
        made = torch.onnx.export(program, input_names=INPUTS, output_names=OUTPUTS, dynamo=True, verbose=False)
    assert made is not None
    made.model.metadata_props.update(facts)
    for node in made.model.graph.all_nodes():
        node.metadata_props.clear()  # where in this program it comes from: a fifth of a small file
    if quant == "int8":
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            whole = Path(folder) / "float.onnx"
            made.save(str(whole))
            _to_int8(whole, file)
    else:
        made.save(str(file))


def _to_int8(whole: Path, file: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    before = logging.root.level
    logging.root.setLevel(logging.ERROR)  # it says on the root logger that another step may come before it
    try:
        quantize_dynamic(whole, file, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QInt8)
    finally:
        logging.root.setLevel(before)
