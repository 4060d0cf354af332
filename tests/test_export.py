"""An export is loaded back in its own runtime, and computes what the eager model does."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from scripts import compress
from scripts import export as tool
from scripts.exporting import artefact, checking
from scripts.exporting.running.opened import open_runner
from scripts.exporting.running.slots import MORE, Full, Slotted
from scripts.exporting.running.torched import graph_of
from scripts.exporting.targets import TARGETS, check
from scripts.generating.cache import decode_step
from train.checkpoint.whole.trained import open_trained
from train.command import cli
from train.config.problems import BadInput
from train.model.transformer import Transformer, dtypes
from train.model.weights import materialise

REPO = Path(__file__).resolve().parent.parent
FACTS = {"tokenizer", "licence", "commit", "versions", "parent", "parent_sha256"}


def exported(run, to, *words):
    """The artefact of a run, which the tool has just written."""
    assert tool.main([str(run), f"to={to}", *words]) == 0
    (folder,) = (run / "exports").iterdir()
    return folder, artefact.read(folder)


def refused(words, capsys, code=2):
    """The one message of a command line that is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        tool.main([str(word) for word in words])
    assert ended.value.code == code
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == (2 if code == 3 else 1), said
    return said[0]


def model_of(*words):
    config = cli.configured(["strategy=single", "precision=float32", *words])
    model = Transformer(config.model, **dtypes(config.precision))
    materialise(model, "", config.model, seed=1, device=torch.device("cpu"))
    return model.eval().requires_grad_(False)


def test_slots_grow_while_tokens_are_read_and_end_with_the_model():
    length = 2 * MORE + 5
    model = model_of("model.num_layers=2", "model.num_kv_heads=2", f"train.seq_len={length}")
    runner = Slotted(graph_of(decode_step(model)), artefact.Shape.of(model.config), batched=False)
    tokens = torch.randint(0, 256, (2, length))
    expected = model(tokens).numpy()
    np.testing.assert_allclose(runner.logits(tokens.numpy()), expected, atol=1e-4)
    for start in (1, MORE, MORE + 1):
        found = [runner.start(tokens[0, :start].numpy()), *map(runner.step, tokens[0, start:].tolist())]
        np.testing.assert_allclose(np.stack(found), expected[0, start - 1 :], atol=1e-4)
    with pytest.raises(Full, match=f"the model has {length} positions"):
        runner.step(0)


@pytest.mark.parametrize("to", ["onnx", "torch_export", "safetensors"])
def test_an_export_computes_what_eager_does_and_says_what_it_is(to, run, capsys):
    folder, made = exported(run, to, "licence=CC-BY-4.0")
    errors = [value for name, value in made.checks.items() if name.endswith("_error")]
    assert len(errors) == 3 and max(errors) < 1e-4
    assert made.checks["loss"] == pytest.approx(made.checks["eager_loss"], rel=1e-6)
    assert made.facts.keys() == FACTS and made.facts["licence"] == "CC-BY-4.0"
    assert made.facts["parent_sha256"] == open_trained(run).sha256 and "torch 2." in made.facts["versions"]
    assert f"{folder}: " in capsys.readouterr().out
    _, runner = open_runner(folder)
    tokens = open_trained(run).corpus().validation_batch(0, 1, 1, slice(None))[0][0]
    with torch.no_grad():
        expected = open_trained(run).model()(tokens[None])[0]
    np.testing.assert_allclose(runner.start(tokens[:7].numpy()), expected[6], atol=1e-4)
    np.testing.assert_allclose(runner.step(int(tokens[7])), expected[7], atol=1e-4)
    first_s, speed = runner.speed(tokens[:5].numpy(), 3)
    assert first_s > 0 and speed > 0
    assert facts_in_the_file(to, folder / made.target.file) >= made.facts.items()
    assert str(REPO).encode() not in (folder / made.target.file).read_bytes(), "paths of this machine are nobody's"


def facts_in_the_file(to, file):
    if to == "onnx":
        import onnx

        return {one.key: one.value for one in onnx.load(file).metadata_props}.items()
    if to == "safetensors":
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            return opened.metadata().items()
    files = {"facts.json": ""}
    torch.export.load(file, extra_files=files)
    return json.loads(files["facts.json"]).items()


@pytest.mark.slow
def test_int8_in_onnxruntime_costs_little_and_is_small(run):
    _, whole = exported(run, "onnx")
    tool.main([str(run), "to=onnx", "quant=int8", f"out={run / 'small'}"])
    small = artefact.read(run / "small")
    model = open_trained(run).model()
    products = sum(4 * p.numel() for name, p in model.named_parameters() if p.ndim > 1 and name != "embed.weight")
    assert whole.bytes - small.bytes > 0.7 * products, "embedding and norms stay float32"
    assert small.checks["prompt_error"] > 1e-4, "it is quantised"
    assert small.checks["loss"] == pytest.approx(small.checks["eager_loss"], rel=1e-3)


def test_a_compressed_run_is_exported_with_the_weights_that_it_computes_with(run):
    from safetensors.torch import load_file

    pruned = run / "pruned"
    assert compress.main([str(run), "method=prune_unstructured", "score=magnitude", f"out={pruned}"]) == 0
    folder, made = exported(pruned, "safetensors")
    weight = load_file(folder / made.target.file)["model.layers.0.mlp.up_proj.weight"]
    assert int((weight == 0).sum()) == weight.numel() // 2
    assert made.facts["parent"] == str(pruned)


def test_what_a_runtime_computes_otherwise_is_not_written(run, capsys, monkeypatch):
    right = checking._Seen.add
    monkeypatch.setattr(
        checking._Seen, "add", lambda self, name, found, expected: right(self, name, found + 1e-3, expected)
    )
    assert "its logits are up to 1.0e-03 from those of eager" in refused([run, "to=safetensors"], capsys, 1)
    assert not [*(run / "exports").iterdir()]


MIXTURE = ["model=moe_tiny"]


@pytest.mark.parametrize("to", TARGETS)
def test_a_mixture_is_refused_with_the_reason(to):
    with pytest.raises(BadInput, match=f"cannot be exported with to={to}, as "):
        check(TARGETS[to], TARGETS[to].quants[0], cli.configured(["strategy=single", *MIXTURE]).model, True)


@pytest.mark.parametrize(
    ("to", "quant", "is_bytes", "words", "said"),
    [
        ("gguf", "F32", False, [], "a tokenizer of bytes"),
        ("gguf", "Q4_0", True, ["model.ffn_dim=100"], "model.ffn_dim=100 is not divisible by 32"),
        ("executorch", "8da4w", True, ["model.dim=136"], "model.dim=136 is not divisible by 32"),
        ("aoti", "int8", True, [], "to=aoti has no quant=int8: use quant=none"),
    ],
)
def test_a_pair_that_does_not_exist_is_refused(to, quant, is_bytes, words, said):
    with pytest.raises(BadInput, match=said):
        check(TARGETS[to], quant, cli.configured(["strategy=single", *words]).model, is_bytes)


def test_wrong_command_lines_get_one_message(run, tmp_path, capsys, monkeypatch):
    assert "no target is given" in refused([run], capsys)
    assert "to=tflite is not valid" in refused([run, "to=tflite"], capsys)
    assert "size=3 is not an option of scripts/export.py" in refused([run, "to=onnx", "size=3"], capsys)
    assert "has no checkpoint, as there is no such folder" in refused([tmp_path / "none", "to=onnx"], capsys)
    assert "exists already" in refused([run, "to=safetensors", f"out={tmp_path}"], capsys)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = refused([run, "to=gguf"], capsys, 3)
    assert said == 'to=gguf needs gguf, xllamacpp, which is not installed: pip install "strategy-lab[edge]"'


def test_a_damaged_or_foreign_artefact_gets_one_sentence(run, tmp_path):
    folder, made = exported(run, "safetensors")
    file = folder / made.target.file
    content = file.read_bytes()
    for wrong, said in (
        (content[:-9], "has .* bytes, and not"),
        (content[:-1] + b"\1", "has another SHA-256"),
    ):
        file.write_bytes(wrong)
        with pytest.raises(BadInput, match=f"cannot be loaded: model.safetensors {said}"):
            open_runner(folder)
    # somebody has made a new export.json for it too
    dataclasses.replace(made, files=artefact.measured(folder)).write(folder)
    file.write_bytes(b"x" * 100)
    (folder / artefact.NAME).unlink()
    dataclasses.replace(made, files=artefact.measured(folder)).write(folder)
    with pytest.raises(BadInput, match=r"cannot be loaded by its runtime \(SafetensorError"):
        open_runner(folder)
    (folder / artefact.NAME).write_text('{"format": 1, "target": "onnx"}')
    with pytest.raises(BadInput, match="does not have the fields of an export"):
        open_runner(folder)
    with pytest.raises(BadInput, match=r"it has no export\.json"):
        open_runner(tmp_path)
